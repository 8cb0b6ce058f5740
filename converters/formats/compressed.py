"""compressed-tensors, as llm-compressor writes it: packed integers, INT8, FP8, and 4-bit floats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmdeploy_jax.converters.fields import shown
from lmdeploy_jax.converters.formats.fp4 import open_mxfp4, open_nvfp4
from lmdeploy_jax.converters.formats.gptq import checked_g_idx
from lmdeploy_jax.converters.formats.packing import Packing
from lmdeploy_jax.converters.formats.parts import Parts, as_slice, cut, within
from lmdeploy_jax.converters.formats.scaled import Block, open_scaled
from lmdeploy_jax.converters.formats.scheme import Scheme, is_float
from lmdeploy_jax.converters.formats.settings import Settings
from lmdeploy_jax.converters.formats.tensor import QuantTensor
from lmdeploy_jax.errors import UnsupportedModelError
from lmdeploy_jax.models.formats import E4M3, INT4, INT8

ROLES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
         "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale")  # fmt: skip
ELEMENTS = {4: INT4, 8: INT8}
ZERO_POINT = "weight_zero_point"
NO_ZERO_POINTS = np.array([0, 0x88888888, 0x80808080], np.uint32).view(np.int32)  # as words of 4 and 8 bits
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense")  # fmt: skip


@dataclass(frozen=True)
class PackedTensor:
    """weight_packed i32 [N, K * bits / 32], weight_scale [N, G] and, where weights are asymmetric,
    weight_zero_point i32 [N * bits / 32, G] or i8 [N, G]: all integers signed, stored plus half their range.
    """

    parts: Parts
    shape: tuple[int, int]
    scheme: Scheme
    bits: int
    g_idx: np.ndarray | None

    def elements(self, rows: range, columns: range) -> np.ndarray:
        codes = unpack(self.words(rows, columns), self.bits)[:, cut(columns, 32 // self.bits)]
        return codes if self.bits == 4 else (codes ^ 128).view(np.int8)

    @property
    def packing(self) -> Packing:
        return Packing(self.bits, across=False, transposed=False)

    def words(self, rows: range, columns: range) -> np.ndarray:
        return self.parts.read("weight_packed", (as_slice(rows), as_slice(within(columns, 32 // self.bits))))

    def scales(self, rows: range) -> np.ndarray:
        return self.parts.read("weight_scale").reshape(self.shape[0], -1)[as_slice(rows)]

    def zeros(self, rows: range) -> np.ndarray | None:
        if not self.scheme.has_zeros:
            return None
        return _zeros(self.parts, self.bits, rows) + (8 if self.bits == 4 else 0)

    def row_scales(self, rows: range) -> None:
        return None


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """i32 [n, m] -> uint8 [n, m * 32 / bits], low bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    out = np.empty((*octets.shape, 2), np.uint8)
    out[..., 0], out[..., 1] = octets & 15, octets >> 4
    return out.reshape(len(words), -1)


def _zeros(parts: Parts, bits: int, rows: range) -> np.ndarray:
    """Signed zero points i16 [n, G]."""
    packed = 32 // bits
    if parts.info(ZERO_POINT).dtype != np.int32:
        return parts.read(ZERO_POINT, (as_slice(rows),)).astype(np.int16)
    words = parts.read(ZERO_POINT, (as_slice(within(rows, packed)),))
    return unpack(words.T, bits).T[cut(rows, packed)].astype(np.int16) - 2 ** (bits - 1)


def check(settings: Settings) -> None:
    """Refuses what `open_tensor` cannot read."""
    settings.only("format", FORMATS)
    if settings.get("quantization_status", default="compressed") != "compressed":
        raise settings.damaged("quantization_status", settings.get("quantization_status"), "compressed")
    if settings.table("transform_config"):
        raise UnsupportedModelError(
            f"{settings.where}: transform_config is not supported: the weights are rotated, and activations "
            "would have to be; give a checkpoint without transforms"
        )
    sparse = settings.table("sparsity_config").get("format", "dense")
    if sparse != "dense":
        raise UnsupportedModelError(
            f"{settings.where}: sparsity_config with format={shown(sparse)} is not supported; give a "
            "checkpoint that is not sparse"
        )
    for name, group in settings.table("config_groups").items():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise settings.damaged(f"config_groups.{name}", group, "an object with a list of targets")


def open_tensor(parts: Parts, settings: Settings) -> QuantTensor:
    """A module's weight. Raises CheckpointError where its tensors do not fit each other or the config."""
    told = group_for(parts.module, settings)
    weights = _table(told, "weights", settings)
    inputs = _table(told, "input_activations", settings)
    activations = _activations(inputs)
    if "weight_packed" in parts:
        if parts.info("weight_packed").dtype == np.int32:
            return _open_packed(parts, weights, settings)
        if "weight_global_scale" in parts:
            return open_nvfp4(parts, "weight_packed", "weight_scale", "weight_global_scale", divides=True)
        return open_mxfp4(parts, "weight_packed", "weight_scale")
    has_zeros = _has_zeros(parts, weights, parts.info("weight_scale").shape)
    return open_scaled(
        parts,
        "weight_scale",
        block=_block(weights, settings),
        activations=activations,
        has_zeros=has_zeros,
        input_role="input_scale" if activations and _is_static(parts, inputs) else None,
    )


def group_for(module: str, settings: Settings) -> Mapping[str, Any]:
    """The config group of a module: one that names it goes before a pattern, and that before a class."""
    ranks: list[tuple[int, Mapping[str, Any]]] = []
    for group in settings.table("config_groups").values():
        ranks += [(rank, group) for target in group["targets"] if (rank := _rank(target, module))]
    return max(ranks, key=lambda found: found[0], default=(0, {}))[1]


def _rank(target: Any, module: str) -> int:
    """How closely a target names a module; 0: not at all."""
    text = str(target)
    if text.startswith("re:"):
        try:
            return 2 if re.match(text[3:], module) else 0
        except re.error:
            return 0
    return 3 if text == module else int(text == "Linear")


def _table(group: Mapping[str, Any], name: str, settings: Settings) -> Settings:
    fields = group.get(name) or {}
    if not isinstance(fields, Mapping):
        raise settings.damaged(name, fields, "an object")
    return Settings(settings.method, fields, f"{settings.where}: {name}")


def _activations(told: Settings) -> str | None:
    kinds = {("int", "8"): INT8, ("float", "8"): E4M3}
    return kinds.get((str(told.get("type")), str(told.get("num_bits"))))


def _is_static(parts: Parts, inputs: Settings) -> bool:
    """Whether activations have one scale, of the file; where they have a zero point too, rows have theirs."""
    if inputs.get("dynamic", default=False) is not False or inputs.get("strategy") != "tensor":
        return False
    return "input_zero_point" not in parts or not parts.read("input_zero_point").any()


def _block(weights: Settings, settings: Settings) -> Block | None:
    if weights.get("strategy") != "block":
        return None
    value = weights.get("block_structure", default=[128, 128])
    value = [int(part) for part in re.findall(r"\d{1,6}", value)] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise settings.damaged("block_structure", value, "two sizes")
    return value[0], value[1]


def _has_zeros(parts: Parts, weights: Settings, shape: Sequence[int]) -> bool:
    """Whether there are zero points, of `shape`. Those of symmetric weights may be there and all 0."""
    symmetric = weights.flag("symmetric", default=True)
    if ZERO_POINT not in parts and symmetric:
        return False
    parts.sized(ZERO_POINT, axes=(0, 1, 2), dtypes=(np.int8, np.int32))
    if not symmetric:
        parts.want(ZERO_POINT, shape, f"the weight of {parts.module}")
        return True
    if not np.isin(parts.read(ZERO_POINT), NO_ZERO_POINTS).all():
        raise parts.damaged(ZERO_POINT, "holds zero points other than 0, but symmetric is true in the config")
    return False


def _open_packed(parts: Parts, weights: Settings, settings: Settings) -> PackedTensor:
    rows, words = parts.sized("weight_packed", axes=2, dtypes=(np.int32,))
    bits = weights.only("num_bits", tuple(ELEMENTS))
    columns = _columns(parts, rows, words, bits)
    info = parts.info("weight_scale")
    if not is_float(info.dtype) or not info.shape or info.shape[0] not in (1, rows) or len(info.shape) > 2:
        raise parts.damaged(
            "weight_scale", f"is {info.dtype} {list(info.shape)}; it must be floats [{rows}, G]"
        )
    count = info.shape[1] if len(info.shape) == 2 else 1
    parts.want("weight_scale", (rows, *info.shape[1:]), f"{parts.names['weight_packed']} of {rows} rows")
    strategy = weights.get("strategy", default="group")
    told = weights.group("group_size") if strategy == "group" else None
    g_idx = None
    if "weight_g_idx" in parts:
        parts.want("weight_g_idx", (columns,), f"{columns} columns")
        if (parts.read("weight_g_idx") != -1).any():  # -1: it was never filled
            g_idx = checked_g_idx(parts, "weight_g_idx", columns, count)
    group = parts.groups("weight_scale", columns, count, told)
    packed = ZERO_POINT in parts and parts.info(ZERO_POINT).dtype == np.int32
    has_zeros = _has_zeros(parts, weights, (-(-rows * bits // 32) if packed else rows, count))
    return PackedTensor(
        parts, (rows, columns), Scheme(ELEMENTS[bits], group, info.dtype, has_zeros), bits, g_idx
    )


def _columns(parts: Parts, rows: int, words: int, bits: int) -> int:
    if "weight_shape" not in parts:
        return words * 32 // bits
    parts.want("weight_shape", (2,), "a matrix")
    shape = [int(size) for size in parts.read("weight_shape")]
    if shape[0] != rows or -(-shape[1] * bits // 32) != words:
        fault = f"holds {shape}, which {bits} bits do not pack into {rows} rows of {words} words"
        raise parts.damaged("weight_shape", fault)
    return shape[1]
