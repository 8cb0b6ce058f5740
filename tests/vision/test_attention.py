"""Long rows of views, a block of keys at a time, give what all scores at once give; taps are PyTorch's."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmdeploy_jax.vision import attention
from lmdeploy_jax.vision.interpolate import grid_taps, resample_bicubic


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_give_what_all_at_once_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jax.numpy.asarray(rng.standard_normal((1, 64, 2, 8)), dtype) for _ in range(3))
    segments = np.repeat([0, 1, 2, -1], [30, 1, 22, 11])[None].astype(np.int32)
    whole = attention.attend(q, k, v, segments)
    monkeypatch.setattr(attention, "DENSE", 16)
    for queries in (64, 32):
        monkeypatch.setattr(attention, "QUERIES", queries)
        blocked = attention.attend(q, k, v, segments)
        np.testing.assert_allclose(
            blocked.astype("float32"), whole.astype("float32"), atol=1e-6 if dtype == "float32" else 0.02
        )


def test_a_patch_sees_its_own_segment_alone() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jax.numpy.asarray(rng.standard_normal((1, 12, 2, 8)), "float32") for _ in range(3))
    segments = np.repeat([0, 1], [5, 7])[None].astype(np.int32)
    whole = attention.attend(q, k, v, segments)
    parts = [attention.attend(q[:, at], k[:, at], v[:, at], None) for at in (slice(0, 5), slice(5, 12))]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), atol=1e-6)


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
