"""Random weights of linear layers as quantised checkpoints have them, of the size and spread of real ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from lmdeploy_jax.bench.shapes import STD, Tensor, Values
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.formats import E2M1, E4M3, E8M0, INT4, INT8, WeightFormat

GROUP = 128  # columns that share a scale, of a row whose length it divides
BLOCK = 128  # rows and columns of a block
LINEAR = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
STACKED = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")
MX_GROUP, MX_STD, MX_BIAS = 32, 2.0, 127  # of E2M1: columns, deviation of elements, that of exponents
DRAWN = 1 << 16  # different values, or words of four nibbles, of which tensors are made
FLOAT8_STD, INT8_STD, INT4_STD = 100.0, 32.0, 2.5  # of elements, a row's largest being the largest there is


@dataclass(frozen=True)
class CheckpointFormat:
    """settings: `quantization_config`. tensors: those of a linear layer's weight [N, K], by role.

    held: how devices hold a weight of so many columns. weights: the names of those that are quantised.
    """

    settings: dict[str, Any]
    tensors: Callable[..., Iterable[Tensor]]
    held: Callable[[int], WeightFormat]
    weights: re.Pattern[str] = LINEAR


def find(model_format: str | None, *, block_scales: bool = False) -> CheckpointFormat | None:
    """None: plain weights. Raises ConfigError where no random checkpoint of that format can be made."""
    if block_scales and model_format != "fp8":
        raise ConfigError(
            f"block_scales are those of fp8, and model_format is {model_format}; leave them out"
        )
    if model_format is None:
        return None
    if model_format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(
            f"no random checkpoint is made with model_format={model_format}; choose one of {known}"
        )
    return FP8_BLOCKS if block_scales else FORMATS[model_format]


def quantise(tensors: Iterable[Tensor], form: CheckpointFormat) -> Iterator[Tensor]:
    """The tensors of a plain checkpoint with those of linear layers' weights in `form`.

    Raises ConfigError where it has none that are quantised so.
    """
    tensors = list(tensors)
    if not any(form.weights.fullmatch(tensor.name) for tensor in tensors):
        method = form.settings["quant_method"]
        raise ConfigError(f"this shape has no weights that {method} quantises; choose another model_format")
    for tensor in tensors:
        if form.weights.fullmatch(tensor.name):
            module = tensor.name.removesuffix("weight")  # which a stack of experts does not end with
            yield from (replace(t, name=module + t.name) for t in form.tensors(*tensor.shape))
        else:
            yield tensor


def _constant(dtype: str, value: Any) -> Values:
    return Values(dtype, lambda rng, count: np.full(count, value))


def _from_table(dtype: str, table: Callable[[np.random.Generator], np.ndarray]) -> Values:
    """Elements of a table, at random: a thread makes gigabytes of them in seconds."""
    drawn = table(np.random.default_rng(0))
    return Values(dtype, lambda rng, count: drawn[rng.integers(0, len(drawn), count, np.uint16)])


def _float8(rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.standard_normal(DRAWN) * FLOAT8_STD, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def _int8(rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.round(rng.standard_normal(DRAWN) * INT8_STD), -127, 127).astype(np.int8)


def _nibbles(rng: np.random.Generator, std: float = INT4_STD) -> np.ndarray:
    """Half of an int32 of 4-bit integers around 8; a tensor has two of these for each of its elements."""
    codes = np.clip(np.round(rng.standard_normal((DRAWN, 4)) * std) + 8, 0, 15).astype(np.uint16)
    return (codes << np.arange(0, 16, 4, dtype=np.uint16)).sum(1, dtype=np.uint16)


FLOATS, BYTES = _from_table("F8_E4M3", _float8), _from_table("I8", _int8)
NIBBLES, AROUND_8 = _from_table("I32", _nibbles), _from_table("I32", lambda rng: _nibbles(rng, 0.7))
ALL_7 = _constant("I32", np.uint16(0x7777))  # zero points of 8, as GPTQ's first version stores them


def _fp8(rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor("weight", (rows, columns), FLOATS)
    yield Tensor("weight_scale", (1,), _constant("F32", np.float32(STD / FLOAT8_STD)))


def _fp8_blocks(rows: int, columns: int) -> Iterator[Tensor]:
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    yield Tensor("weight", (rows, columns), FLOATS)
    yield Tensor("weight_scale_inv", blocks, _constant("F32", np.float32(STD / FLOAT8_STD)))


def _smooth_quant(rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor("weight", (rows, columns), BYTES)
    yield Tensor("scale", (rows, 1), _constant("F32", np.float32(STD / INT8_STD)))


def _scales(rows: int, columns: int, dtype: str = "F16", *, by_row: bool = False) -> Tensor:
    groups = columns // GROUP
    values = _constant(dtype, np.float32(STD / INT4_STD).astype(Values.DTYPES[dtype]))
    return Tensor("scales", (rows, groups) if by_row else (groups, rows), values)


def _awq(rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor("qweight", (columns, rows // 8), NIBBLES)
    yield Tensor("qzeros", (columns // GROUP, rows // 8), AROUND_8)
    yield _scales(rows, columns)


def _gptq(rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor("qweight", (columns // 8, rows), NIBBLES)
    yield Tensor("qzeros", (columns // GROUP, rows // 8), ALL_7)
    yield _scales(rows, columns)


def _packed(rows: int, columns: int) -> Iterator[Tensor]:
    yield Tensor("weight_packed", (rows, columns // 8), NIBBLES)
    yield replace(_scales(rows, columns, "BF16", by_row=True), name="weight_scale")
    yield Tensor("weight_shape", (2,), Values("I64", lambda rng, count: np.array([rows, columns])))


def _mx_bytes(rng: np.random.Generator) -> np.ndarray:
    """Two elements of E2M1 each."""
    numbers = rng.standard_normal((DRAWN, 2)).astype(np.float32) * MX_STD
    codes = numbers.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes[:, 0] | codes[:, 1] << 4


MX_BYTES = _from_table("U8", _mx_bytes)
MX_EXPONENT = _constant("U8", np.uint8(MX_BIAS + round(np.log2(STD / MX_STD))))


def _mxfp4(experts: int, columns: int, rows: int) -> Iterator[Tensor]:
    """Of a stack whose inner axis is the first."""
    groups = columns // MX_GROUP
    yield Tensor("_blocks", (experts, rows, groups, MX_GROUP // 2), MX_BYTES)
    yield Tensor("_scales", (experts, rows, groups), MX_EXPONENT)


def _by_group(element: str, columns: int, scale: str, **more: Any) -> WeightFormat:
    return WeightFormat(element, GROUP, columns // GROUP, scale, **more)


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_BLOCKS = CheckpointFormat(
    {**_FP8, "weight_block_size": [BLOCK, BLOCK]},
    _fp8_blocks,
    lambda columns: _by_group(E4M3, columns, "float32", activations=E4M3),
)
FORMATS = {
    "fp8": CheckpointFormat(
        _FP8, _fp8, lambda columns: WeightFormat(E4M3, columns, 1, "float32", activations=E4M3)
    ),
    "awq": CheckpointFormat(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        _awq,
        lambda columns: _by_group(INT4, columns, "float16", zeros="uint8"),
    ),
    "gptq": CheckpointFormat(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
        _gptq,
        lambda columns: _by_group(INT4, columns, "float16"),
    ),
    "compressed-tensors": CheckpointFormat(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
            "ignore": ["lm_head"],
        },
        _packed,
        lambda columns: _by_group(INT4, columns, "bfloat16"),
    ),
    "smooth_quant": CheckpointFormat(
        {"quant_method": "smooth_quant", "quant_dtype": "int8"},
        _smooth_quant,
        lambda columns: WeightFormat(INT8, columns, 1, "float32", activations=INT8),
    ),
    "mxfp4": CheckpointFormat(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        _mxfp4,
        lambda columns: WeightFormat(E2M1, MX_GROUP, columns // MX_GROUP, E8M0),
        STACKED,
    ),
}
