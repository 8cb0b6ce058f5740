"""AWQ (Lin et al., 2023) as AutoAWQ's `gemm` version and LMDeploy's `lite auto_awq` write it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmdeploy_jax.converters.formats.packing import Packing
from lmdeploy_jax.converters.formats.parts import Parts, as_slice, cut, within
from lmdeploy_jax.converters.formats.scheme import Scheme
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.models.formats import INT4

ROLES = ("qweight", "qzeros", "scales")
PACKED = 8  # outputs in an int32
PACKING = Packing(4, across=True, transposed=True, order=(0, 2, 4, 6, 1, 3, 5, 7))


@dataclass(frozen=True)
class AwqTensor:
    """qweight i32 [K, N / 8], scales [G, N], and qzeros i32 [G, N / 8] where there are zero points."""

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme
    g_idx: None = None
    packing: Packing = PACKING

    def elements(self, rows: range, columns: range) -> np.ndarray:
        return unpack(self.words(rows, columns))[:, cut(rows, PACKED)].T

    def words(self, rows: range, columns: range) -> np.ndarray:
        return self.parts.read("qweight", (as_slice(columns), as_slice(within(rows, PACKED))))

    def scales(self, rows: range) -> np.ndarray:
        return self.parts.read("scales", (slice(None), as_slice(rows))).T

    def zeros(self, rows: range) -> np.ndarray | None:
        if not self.scheme.has_zeros:
            return None
        words = self.parts.read("qzeros", (slice(None), as_slice(within(rows, PACKED))))
        return unpack(words)[:, cut(rows, PACKED)].T

    def row_scales(self, rows: range) -> None:
        return None


def unpack(words: np.ndarray) -> np.ndarray:
    """i32 [a, n] -> uint8 [a, 8 n]: nibbles 0 to 7 of a word hold outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    pairs = np.empty((*words.shape, PACKED // 2), np.uint16)  # of neighbours, which lie 16 bits apart
    for pair in range(PACKED // 2):
        both = words.view(np.uint32) >> np.uint32(4 * pair) & np.uint32(0x000F000F)
        pairs[..., pair] = both | both >> np.uint32(8)
    return pairs.view(np.uint8).reshape(len(words), -1)


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("bits", (4,), "w_bit")
    settings.only("version", ("gemm",), lower=True)


def open_tensor(parts: Parts, settings: Settings) -> AwqTensor:
    """A module's weight. Raises CheckpointError where its tensors do not fit each other or the config."""
    columns, words = parts.sized("qweight", axes=2, dtypes=(np.int32,))
    count, rows = parts.sized("scales", axes=2)
    parts.want("scales", (count, words * PACKED), f"{parts.names['qweight']} of {words} words a row")
    group = parts.groups("scales", columns, count, settings.group("group_size", "q_group_size"))
    has_zeros = settings.flag("zero_point", "qzeros" in parts)
    if has_zeros:
        parts.sized("qzeros", axes=2, dtypes=(np.int32,))
        parts.want("qzeros", (count, words), f"{parts.names['scales']} of {count} groups")
    elif "qzeros" in parts and (parts.read("qzeros").view(np.uint32) != 0x88888888).any():
        raise parts.damaged("qzeros", "holds zero points other than 8, but zero_point is false in the config")
    return AwqTensor(parts, (rows, columns), Scheme(INT4, group, parts.info("scales").dtype, has_zeros))
