"""Against the tools that write the formats: their tensors, and what they themselves make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmdeploy_jax.converters.formats import recognise
from lmdeploy_jax.converters.formats.reader import QuantReader
from lmdeploy_jax.converters.safetensors import CheckpointReader
from tests.converters.formats.packers import ct_config

NAME = "model.layers.0.mlp.up_proj"


def read_weight(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> np.ndarray:
    save_file(
        {f"{NAME}.{role}": tensor.contiguous() for role, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    quantisation = recognise({"quantization_config": config}, "config.json")
    assert quantisation is not None
    return QuantReader(CheckpointReader(folder), quantisation).read(f"{NAME}.weight")


def scales_for(weight: torch.Tensor, most: float, height: int, width: int) -> torch.Tensor:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height)).abs()
    return padded.unflatten(0, (-1, height)).unflatten(-1, (-1, width)).amax((1, 3)) / most


GROUP16 = {"strategy": "tensor_group", "group_size": 16}
GROUP32 = {"strategy": "group", "group_size": 32}
WEIGHTS = {
    "W4 g128": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
    "W4 asym g32": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "W4 channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "W8 g64": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}),
    "W8A8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "W8 asym": ("naive-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "FP8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "NVFP4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", **GROUP16}),
    "MXFP4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **GROUP32}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    """Its own compressor writes the tensors, and its decompressor says what they stand for."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form, told = WEIGHTS[kind]
    weights = {"symmetric": True, **told}
    torch.manual_seed(0)
    weight = torch.randn(192, 256)
    height, width = {"block": (128, 128), "tensor": weight.shape, "channel": (1, 256)}.get(
        weights["strategy"], (1, weights.get("group_size"))
    )
    most = {("int", 4): 7.5, ("int", 8): 127.5, ("float", 8): 448.0, ("float", 4): 6.0}[
        weights["type"], weights["num_bits"]
    ]
    state = {"weight": weight, "weight_scale": scales_for(weight, most, height, width)}
    if not weights["symmetric"]:
        half = 2 ** (weights["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, state["weight_scale"].shape, dtype=torch.int8)
    if kind == "NVFP4":
        state["weight_global_scale"] = torch.tensor([448.0 / float(state["weight_scale"].max())])
        state["weight_scale"] = (
            (state["weight_scale"] * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
        )
    if kind == "MXFP4":
        state["weight_scale"] = state["weight_scale"].log2().ceil().exp2()
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    tool = BaseCompressor.get_value_from_registry(form)
    tensors = tool.compress(state, scheme)
    stands_for = tool.decompress(tensors, scheme)["weight"].float().numpy()
    read = read_weight(tmp_path, tensors, json.loads(json.dumps(ct_config(form, weights))))
    near = 1e-2 if kind == "NVFP4" else 2e-7  # the tool decompresses NVFP4 in bfloat16
    assert np.abs(read - stands_for).max() <= near * np.abs(stands_for).max()
    assert np.abs(read - weight.numpy()).max() < 0.35 * weight.abs().max() or not weights["symmetric"]


@pytest.mark.parametrize("shape", [(256, 384), (200, 300)])
def test_blocks_of_fp8_as_transformers_has_them(shape: tuple[int, int], tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    torch.manual_seed(0)
    weight = torch.randn(shape)
    scale = scales_for(weight, 448.0, 128, 128)
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    stored = (weight / wide).to(torch.float8_e4m3fn)
    theirs = _dequantize_fp8_weight(stored, scale, [128, 128], torch.float32).numpy()
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    ours = read_weight(tmp_path, {"weight": stored, "weight_scale_inv": scale}, config)
    np.testing.assert_array_equal(ours, theirs)
