"""GPTQ (Frantar et al., 2022) as AutoGPTQ, GPTQModel and LMDeploy's `lite auto_gptq` write it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmdeploy_jax.converters.formats.packing import Packing
from lmdeploy_jax.converters.formats.parts import Parts, as_slice, cut, within
from lmdeploy_jax.converters.formats.scheme import Scheme
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.models.formats import INT4, INT8

ROLES = ("qweight", "qzeros", "scales", "g_idx")
ELEMENTS = {4: INT4, 8: INT8}
V1, V2 = "gptq", "gptq_v2"


@dataclass(frozen=True)
class GptqTensor:
    """qweight i32 [K * bits / 32, N], qzeros i32 [G, N * bits / 32], scales [G, N], g_idx i32 [K].

    zero_offset: what is added to the stored zero points, which version 1 of the format stores less 1.
    """

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme
    bits: int
    zero_offset: int
    g_idx: np.ndarray | None

    def elements(self, rows: range, columns: range) -> np.ndarray:
        codes = _unpack_down(self.words(rows, columns), self.bits)
        return _signed(codes[cut(columns, 32 // self.bits)].T, self.bits)

    @property
    def packing(self) -> Packing:
        return Packing(self.bits, across=False, transposed=True)

    def words(self, rows: range, columns: range) -> np.ndarray:
        return self.parts.read("qweight", (as_slice(within(columns, 32 // self.bits)), as_slice(rows)))

    def scales(self, rows: range) -> np.ndarray:
        return self.parts.read("scales", (slice(None), as_slice(rows))).T

    def zeros(self, rows: range) -> np.ndarray | None:
        if not self.scheme.has_zeros:
            return None
        packed = 32 // self.bits
        words = self.parts.read("qzeros", (slice(None), as_slice(within(rows, packed))))
        zeros = _unpack_across(words, self.bits)[:, cut(rows, packed)].T.astype(np.int16)
        return zeros + self.zero_offset - (128 if self.bits == 8 else 0)

    def row_scales(self, rows: range) -> None:
        return None


def _signed(codes: np.ndarray, bits: int) -> np.ndarray:
    """8-bit codes are held less 128, so that they and their zero points are signed."""
    return (codes ^ 128).view(np.int8) if bits == 8 else codes


def _unpack_down(words: np.ndarray, bits: int) -> np.ndarray:
    """i32 [a, n] -> uint8 [a * 32 / bits, n]: the values of a word lie below each other, low bits first."""
    octets = words.view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((len(words), 32 // bits, words.shape[1]), np.uint8)
    for octet in range(4):
        if bits == 8:
            out[:, octet] = octets[..., octet]
        else:
            out[:, 2 * octet], out[:, 2 * octet + 1] = octets[..., octet] & 15, octets[..., octet] >> 4
    return out.reshape(-1, words.shape[1])


def _unpack_across(words: np.ndarray, bits: int) -> np.ndarray:
    """i32 [a, n] -> uint8 [a, n * 32 / bits]: the values of a word lie beside each other, low bits first."""
    return np.ascontiguousarray(_unpack_down(np.ascontiguousarray(words.T), bits).T)


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("bits", (4, 8))
    settings.only("checkpoint_format", (V1, V2))
    settings.only("pack_dtype", ("int32",))


def open_tensor(parts: Parts, settings: Settings) -> GptqTensor:
    """A module's weight. Raises CheckpointError where its tensors do not fit each other or the config."""
    count, rows = parts.sized("scales", axes=2)
    _, packed_rows = parts.sized("qzeros", axes=2, dtypes=(np.int32,))
    bits = _bits(parts, rows, packed_rows, settings)
    words, _ = parts.sized("qweight", axes=2, dtypes=(np.int32,))
    columns = words * 32 // bits
    parts.want("qweight", (words, rows), f"{parts.names['scales']} of {rows} outputs")
    parts.want("qzeros", (count, rows * bits // 32), f"{parts.names['scales']} of {count} groups")
    told = settings.group("group_size") if not settings.table("dynamic") else None
    group = parts.groups("scales", columns, count, told)
    stored = _constant_zero(parts, bits, sym=settings.flag("sym", default=False))
    scheme = Scheme(ELEMENTS[bits], group, parts.info("scales").dtype, stored is None)
    offset = int(settings.get("checkpoint_format", default=V1) == V1)
    return GptqTensor(parts, (rows, columns), scheme, bits, offset, _g_idx(parts, columns, count))


def _bits(parts: Parts, rows: int, packed_rows: int, settings: Settings) -> int:
    """As the tensors have it: `dynamic` may give modules bits of their own."""
    bits = packed_rows * 32 // rows
    told = settings.get("bits")
    if bits not in ELEMENTS or (told not in (None, bits) and not settings.table("dynamic")):
        fault = f"packs {rows} outputs of {bits} bits into {packed_rows} words"
        raise parts.damaged("qzeros", f"{fault}, but the config has bits={told}; 4 and 8 can be read")
    return bits


def _constant_zero(parts: Parts, bits: int, *, sym: bool) -> int | None:
    """The stored zero point of symmetric weights, of either version: writers have mixed up the versions'
    names, and the values tell. None: the weights are asymmetric.
    """
    if not sym:
        return None
    half = 2 ** (bits - 1)
    stored = _unpack_across(parts.read("qzeros"), bits)
    low, high = int(stored.min()), int(stored.max())
    if low != high or low not in (half, half - 1):
        raise parts.damaged(
            "qzeros", f"holds zero points from {low} to {high}, but sym is true in the config: all {half} "
            f"or {half - 1} are symmetric"
        )  # fmt: skip
    return low


def _g_idx(parts: Parts, columns: int, count: int) -> np.ndarray | None:
    if "g_idx" not in parts:
        return None
    parts.sized("g_idx", axes=1, dtypes=(np.int32, np.int64))
    parts.want("g_idx", (columns,), f"{parts.names['qweight']} of {columns} columns")
    return checked_g_idx(parts, "g_idx", columns, count)


def checked_g_idx(parts: Parts, role: str, columns: int, count: int) -> np.ndarray | None:
    """The group of each column, of `count`; None where they lie side by side in order."""
    g_idx = parts.read(role).astype(np.int64)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= count:
        raise parts.damaged(role, f"holds groups from {low} to {high}, but there are {count}")
    return None if np.array_equal(g_idx, np.arange(columns) // (columns // count)) else g_idx.astype(np.int32)
