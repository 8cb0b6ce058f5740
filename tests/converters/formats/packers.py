"""Quantised checkpoints, written here as the formats' own tools do: independent of what reads them.

A packer rounds a weight [N, K] to the nearest and gives the tensors of the module, and the weight that they
stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
Tensors = dict[str, np.ndarray]
Packer = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]


# --- Bits --------------------------------------------------------------------------------------------------


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values [n, k] -> i32 [n, ceil(k * bits / 32)], one stream of bits a row, low bits first."""
    stream = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=-1, bitorder="little").view(np.int32)


def pack_awq(values: np.ndarray) -> np.ndarray:
    """Unsigned nibbles [a, n] -> i32 [a, n / 8]: nibble i of a word is output (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def e2m1_codes(values: np.ndarray) -> np.ndarray:
    """The nearest code of each value."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    code = np.abs(np.abs(values)[..., None] - table).argmin(-1)
    return (code + 8 * np.signbit(values)).astype(np.uint8)


def e2m1_values(codes: np.ndarray) -> np.ndarray:
    """Sign, two bits of exponent, one of mantissa, as the standard has them."""
    exponent, mantissa = codes >> 1 & 3, codes & 1
    size = np.where(exponent == 0, mantissa * 0.5, (1 + mantissa / 2) * 2.0 ** (exponent.astype(int) - 1))
    return np.where(codes & 8, -size, size).astype(np.float32)


# --- Rounding ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """Integers [N, K] from 0 on, scales and zeros [N, G], and the weight that they stand for."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    weight: np.ndarray


def round_integers(
    weight: np.ndarray, bits: int, group: int, *, sym: bool, groups: np.ndarray | None = None
) -> Rounded:
    rows, columns = weight.shape
    count = columns // group
    groups = np.arange(columns) // group if groups is None else groups
    most = 2**bits - 1
    order = np.argsort(groups, kind="stable")
    grouped = weight[:, order].reshape(rows, count, group)
    if sym:
        scale = np.abs(grouped).max(-1) * 2 / most
        zero = np.full((rows, count), 2 ** (bits - 1))
    else:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scale = (high - low) / most
        zero = np.clip(np.round(-low / scale.astype(np.float16).astype(np.float32)), 0, most).astype(int)
    scale = scale.astype(np.float16)
    wide = scale.astype(np.float32)[:, groups]
    q = np.clip(np.round(weight / wide) + zero[:, groups], 0, most).astype(np.int64)
    return Rounded(q, scale, zero, ((q - zero[:, groups]) * wide).astype(np.float32))


# --- Formats -----------------------------------------------------------------------------------------------


def awq(weight: np.ndarray, group: int, *, sym: bool = False) -> tuple[Tensors, np.ndarray]:
    made = round_integers(weight, 4, weight.shape[1] if group == -1 else group, sym=sym)
    tensors = {"qweight": pack_awq(made.q.T), "scales": np.ascontiguousarray(made.scale.T)}
    return tensors | ({} if sym else {"qzeros": pack_awq(made.zero.T)}), made.weight


def gptq(
    weight: np.ndarray, bits: int, group: int, *, sym: bool, version: int = 1, act_order: int = 0
) -> tuple[Tensors, np.ndarray]:
    columns = weight.shape[1]
    groups = np.arange(columns) // group
    if act_order:
        groups = np.random.default_rng(act_order).permutation(groups)
    made = round_integers(weight, bits, group, sym=sym, groups=groups)
    # Version 1 stores zero points less 1; a writer's zero point of 0 becomes all ones.
    stored = (made.zero - (version == 1)) % 2**bits
    if version == 1 and (made.zero == 0).any():
        made = Rounded(made.q, made.scale, made.zero, made.weight + 0)
        lost = (made.zero == 0) * 2**bits
        made.weight[...] = (made.q - (made.zero + lost)[:, groups]) * made.scale.astype(np.float32)[:, groups]
    tensors = {
        "qweight": np.ascontiguousarray(pack_bits(made.q.T.copy().T, bits).T),
        "qzeros": pack_bits(stored.T, bits),
        "scales": np.ascontiguousarray(made.scale.T),
        "g_idx": groups.astype(np.int32),
    }
    return tensors, made.weight


def ct_packed(weight: np.ndarray, bits: int, group: int, *, sym: bool) -> tuple[Tensors, np.ndarray]:
    made = round_integers(weight, bits, weight.shape[1] if group == -1 else group, sym=sym)
    tensors = {
        "weight_packed": pack_bits(made.q, bits),
        "weight_scale": made.scale,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    zero = {} if sym else {"weight_zero_point": np.ascontiguousarray(pack_bits(made.zero.T, bits).T)}
    return tensors | zero, made.weight


def scaled(
    weight: np.ndarray,
    dtype: Any,
    name: str,
    *,
    block: tuple[int, int] | None = None,
    shape: Callable[[np.ndarray], np.ndarray] = lambda scale: scale,
    scale_dtype: Any = np.float32,
    **more: np.ndarray,
) -> tuple[Tensors, np.ndarray]:
    """One byte an element; `block` None: one scale for all. `shape` brings scales [a, b] into the file's."""
    rows, columns = weight.shape
    height, width = block or (rows, columns)
    height, width = height or rows, width or columns
    most = 127 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    padded = np.pad(weight, ((0, -rows % height), (0, -columns % width)))
    tiles = padded.reshape(len(padded) // height, height, -1, width)
    scale = (np.abs(tiles).max((1, 3)) / most).astype(scale_dtype)
    if scale_dtype == E8M0:  # powers of two, rounded up
        scale = np.exp2(np.ceil(np.log2(np.abs(tiles).max((1, 3)) / most))).astype(E8M0)
    wide = scale.astype(np.float32).repeat(height, 0).repeat(width, 1)[:rows, :columns]
    q = weight / wide
    q = np.round(q).astype(np.int8) if dtype == np.int8 else np.clip(q, -most, most).astype(dtype)
    return {"weight": q, name: shape(scale), **more}, q.astype(np.float32) * wide


def mx(weight: np.ndarray, packed: str, scales: str, *, blocks: bool = False) -> tuple[Tensors, np.ndarray]:
    """MXFP4. `blocks`: as gpt-oss has it, a group an axis."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, 32)
    exponent = np.ceil(np.log2(np.abs(grouped).max(-1) / 6)).astype(int)
    codes = e2m1_codes(grouped / np.exp2(exponent)[..., None])
    octets = codes[..., 0::2] | codes[..., 1::2] << 4
    made = e2m1_values(codes) * np.exp2(exponent).astype(np.float32)[..., None]
    tensors = {
        packed: octets if blocks else octets.reshape(rows, -1),
        scales: (exponent + 127).astype(np.uint8),
    }
    return tensors, made.reshape(rows, columns)


def nv(weight: np.ndarray, packed: str, scale_2: str, *, inverse: bool) -> tuple[Tensors, np.ndarray]:
    """NVFP4. `inverse`: the global scale is stored as what divides."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, 16)
    whole = np.float32(np.abs(weight).max() / (6 * 448))
    scale = (np.abs(grouped).max(-1) / 6 / whole).astype(E4M3)
    both = scale.astype(np.float32) * whole
    codes = e2m1_codes(grouped / both[..., None])
    octets = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(rows, -1)
    stored = np.array([1 / whole if inverse else whole], np.float32)
    tensors = {packed: octets, "weight_scale": scale, scale_2: stored}
    return tensors, (e2m1_values(codes) * both[..., None]).reshape(rows, columns)


def ct_config(
    kind: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


@dataclass(frozen=True)
class Case:
    """A format's variant. exact: how near the reader has to come, as a share of the largest weight."""

    config: Mapping[str, Any]
    pack: Packer
    exact: float = 0.0
    side_file: str | None = None
    drop: tuple[str, ...] = field(default=())


def _integers(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, **more}


def _float8(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
ROW = (1, 0)
SCALAR = partial(np.reshape, shape=())
AS_BYTES = partial(np.ndarray.view, dtype=np.uint8)
AS_BLOCKS = partial(np.expand_dims, axis=(1, 3))

CASES: Mapping[str, Case] = {
    "awq": Case(AWQ | {"group_size": 16}, partial(awq, group=16)),
    "awq_sym": Case(AWQ | {"group_size": 32, "zero_point": False}, partial(awq, group=32, sym=True)),
    "awq_channel": Case(AWQ | {"q_group_size": -1}, partial(awq, group=-1)),
    "gptq": Case(GPTQ | {"group_size": 32}, partial(gptq, bits=4, group=32, sym=True)),
    "gptq_v2_by_value": Case(GPTQ | {"group_size": 32}, partial(gptq, bits=4, group=32, sym=True, version=2)),
    "gptq_asym": Case(GPTQ | {"group_size": 16, "sym": False}, partial(gptq, bits=4, group=16, sym=False)),
    "gptq_asym_v2": Case(
        GPTQ | {"group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"},
        partial(gptq, bits=4, group=16, sym=False, version=2),
    ),
    "gptq_8bit": Case(GPTQ | {"bits": 8, "group_size": 32}, partial(gptq, bits=8, group=32, sym=True)),
    "gptq_8bit_asym": Case(
        GPTQ | {"bits": 8, "group_size": 32, "sym": False}, partial(gptq, bits=8, group=32, sym=False)
    ),
    "gptq_act_order": Case(
        GPTQ | {"group_size": 16, "desc_act": True}, partial(gptq, bits=4, group=16, sym=True, act_order=1)
    ),
    "ct_w4": Case(
        ct_config("pack-quantized", _integers(4, strategy="group", group_size=32)),
        partial(ct_packed, bits=4, group=32, sym=True),
    ),
    "ct_w4_asym": Case(
        ct_config("pack-quantized", _integers(4, strategy="group", group_size=16, symmetric=False)),
        partial(ct_packed, bits=4, group=16, sym=False),
    ),
    "ct_w4_channel": Case(
        ct_config("pack-quantized", _integers(4, strategy="channel")),
        partial(ct_packed, bits=4, group=-1, sym=True),
    ),
    "ct_w8": Case(
        ct_config("pack-quantized", _integers(8, strategy="group", group_size=32)),
        partial(ct_packed, bits=8, group=32, sym=True),
    ),
    "ct_int8": Case(
        ct_config("int-quantized", _integers(8, strategy="channel"), TOKEN | {"type": "int"}),
        partial(scaled, dtype=np.int8, name="weight_scale", block=ROW),
    ),
    "ct_fp8_tensor": Case(
        ct_config("float-quantized", _float8("tensor"), _float8("tensor", dynamic=False)),
        partial(scaled, dtype=E4M3, name="weight_scale", shape=SCALAR, input_scale=np.ones((), np.float32)),
    ),
    "ct_fp8_channel": Case(
        ct_config("float-quantized", _float8("channel"), TOKEN),
        partial(scaled, dtype=E4M3, name="weight_scale", block=ROW),
    ),
    "ct_fp8_block": Case(
        ct_config("float-quantized", _float8("block", block_structure=[16, 32]), TOKEN),
        partial(scaled, dtype=E4M3, name="weight_scale", block=(16, 32)),
    ),
    "ct_mxfp8": Case(
        ct_config("mxfp8-quantized", _float8("group", group_size=32)),
        partial(scaled, dtype=E4M3, name="weight_scale", block=(1, 32), scale_dtype=E8M0, shape=AS_BYTES),
    ),
    "ct_nvfp4": Case(
        ct_config("nvfp4-pack-quantized", _float8("tensor_group", num_bits=4, group_size=16)),
        partial(nv, packed="weight_packed", scale_2="weight_global_scale", inverse=True),
        exact=1e-6,
    ),
    "ct_mxfp4": Case(
        ct_config("mxfp4-pack-quantized", _float8("group", num_bits=4, group_size=32)),
        partial(mx, packed="weight_packed", scales="weight_scale"),
    ),
    "fp8_block": Case(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        partial(scaled, dtype=E4M3, name="weight_scale_inv", block=(128, 128)),
    ),
    "fp8_block_ue8m0": Case(
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
        partial(scaled, dtype=E4M3, name="weight_scale_inv", block=(32, 32), scale_dtype=E8M0),
    ),
    "fp8_tensor": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        partial(
            scaled, dtype=E4M3, name="weight_scale", shape=SCALAR, input_scale=np.full((), 0.5, np.float32)
        ),
    ),
    "smooth_int8": Case(
        {"quant_method": "smooth_quant", "quant_dtype": "int8"},
        partial(scaled, dtype=np.int8, name="scale", block=ROW),
    ),
    "smooth_fp8": Case(
        {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"},
        partial(scaled, dtype=E4M3, name="scale", block=ROW),
    ),
    "smooth_e5m2": Case(
        {"quant_method": "smooth_quant", "quant_dtype": "float8_e5m2"},
        partial(scaled, dtype=E5M2, name="scale", block=ROW),
    ),
    "modelopt_fp8": Case(
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        partial(scaled, dtype=E4M3, name="weight_scale", shape=SCALAR, input_scale=np.ones((), np.float32)),
        side_file="hf_quant_config.json",
    ),
    "modelopt_blocks": Case(
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
        partial(scaled, dtype=E4M3, name="weight_scale", block=(128, 128), shape=AS_BLOCKS),
    ),
    "modelopt_nvfp4": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        partial(nv, packed="weight", scale_2="weight_scale_2", inverse=False),
    ),
}  # fmt: skip
"""Every variant that a checkpoint of linear layers comes in. MXFP4's experts are no linear layers."""


def quantise_folder(plain: Path, quantised: Path, dense: Path, case: Case) -> None:
    """Of a checkpoint: a quantised one, and one of the plain weights that those stand for."""
    for folder in (quantised, dense):
        shutil.copytree(plain, folder)
    packed, widened = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        packed[name] = widened[name] = tensor
        if name.endswith("_proj.weight"):
            del packed[name]
            tensors, made = case.pack(tensor.float().numpy())
            packed |= {
                f"{name.removesuffix('weight')}{role}": as_torch(array) for role, array in tensors.items()
            }
            widened[name] = torch.from_numpy(made)
    save_file(packed, quantised / "model.safetensors")
    save_file(widened, dense / "model.safetensors")
    tell(quantised, case)


def tell(folder: Path, case: Case) -> None:
    """Writes what a checkpoint says of its quantisation."""
    if case.side_file is not None:
        (folder / case.side_file).write_text(json.dumps(case.config))
        return
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": case.config}))


TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, E8M0: torch.float8_e8m0fnu}


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor that the reference writer of safetensors knows the dtype of."""
    kind = TORCH.get(array.dtype.type)
    array = np.array(array, order="C")  # each its own, as the writer wants it
    return torch.from_numpy(array) if kind is None else torch.from_numpy(array.view(np.uint8)).view(kind)
