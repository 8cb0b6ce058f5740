"""Taps of position tables are PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_jax.vision.interpolate import grid_taps, resample_bicubic


@pytest.mark.parametrize(("kind", "align"), [("bicubic", False), ("bilinear", True)])
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (8, 8), (1, 5), (13, 2)])
def test_taps(kind: str, align: bool, rows: int, columns: int) -> None:
    import torch

    table = np.random.default_rng(0).standard_normal((5, 5, 3)).astype(np.float32)
    taps, weights = grid_taps(rows, columns, 5, kind, align_corners=align)  # type: ignore[arg-type]
    ours = (table.reshape(25, 3)[taps] * weights[..., None]).sum(axis=2)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], size=(rows, columns), mode=kind, align_corners=align
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).numpy(), atol=1e-5)
    if kind == "bicubic":
        np.testing.assert_allclose(resample_bicubic(table, rows, columns), ours, atol=1e-5)
