"""Formats: what is read is what the integers, codes and scales of the file stand for, whole and by slice."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmdeploy_jax.converters.formats import recognise
from lmdeploy_jax.converters.formats.reader import QuantReader
from lmdeploy_jax.converters.formats.scheme import pack_words, unpack_words
from lmdeploy_jax.converters.safetensors import CheckpointReader
from tests.converters.formats.packers import CASES, as_torch, e2m1_values, mx, tell

NAME = "model.layers.0.self_attn.q_proj"
SHAPE = (96, 128)


def read_module(folder: Path, tensors: dict[str, np.ndarray], name: str = NAME) -> QuantReader:
    """A checkpoint of one module beside a plain norm, opened as its config says."""
    kept = {f"{name}.{role}": as_torch(array) for role, array in tensors.items()}
    save_file(kept | {"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantisation = recognise(config, str(folder / "config.json"), folder)
    assert quantisation is not None
    return QuantReader(CheckpointReader(folder), quantisation)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_read_is_what_the_file_stands_for(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    weight = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    weight[5] *= 20  # rows and columns differ, so that scales of the wrong ones would show
    weight[:, 70:80] *= 3
    tensors, stands_for = case.pack(weight)
    (tmp_path / "config.json").write_text("{}")
    tell(tmp_path, case)
    reader = read_module(tmp_path, tensors)
    assert set(reader.names()) == {f"{NAME}.weight", "model.norm.weight"}
    assert reader.info(f"{NAME}.weight").shape == SHAPE
    whole = reader.read(f"{NAME}.weight")
    assert np.abs(whole - stands_for).max() <= case.exact * np.abs(stands_for).max()
    assert np.abs(whole - weight).max() < 0.3 * np.abs(weight).max(), "the packer itself"
    for rows, columns in (
        (slice(3, 29), slice(0, 128)),
        (slice(40, 41), slice(17, 99)),
        (slice(0, 96), slice(64, 128)),
    ):
        np.testing.assert_array_equal(reader.read(f"{NAME}.weight", (rows, columns)), whole[rows, columns])


def test_the_experts_of_gpt_oss(tmp_path: Path) -> None:
    """`convert_moe_packed_tensors` of transformers is the oracle; it gives [X, K, N]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight = np.random.default_rng(1).normal(size=(3 * 64, 96)).astype(np.float32)
    tensors, stands_for = mx(weight, "blocks", "scales", blocks=True)
    blocks, scales = tensors["blocks"].reshape(3, 64, 3, 16), tensors["scales"].reshape(3, 64, 3)
    named = {"experts.gate_up_proj_blocks": as_torch(blocks), "experts.gate_up_proj_scales": as_torch(scales)}
    save_file(named, tmp_path / "model.safetensors")
    quantisation = recognise({"quantization_config": {"quant_method": "mxfp4"}}, "config.json")
    assert quantisation is not None
    read = QuantReader(CheckpointReader(tmp_path), quantisation).read("experts.gate_up_proj.weight")
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(read, stands_for)
    np.testing.assert_array_equal(read.reshape(3, 64, 96), theirs.numpy().transpose(0, 2, 1))


def test_codes_of_e2m1_are_those_of_the_type() -> None:
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(e2m1_values(codes), codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    tiles=st.integers(1, 4),
    tile=st.sampled_from([4, 8, 32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_words_hold_the_codes(rows: int, tiles: int, tile: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, tiles * tile)).astype(np.uint8)
    words = pack_words(codes, tile)
    assert (words.shape, words.dtype) == ((rows, tiles * tile // 4), np.uint16)
    np.testing.assert_array_equal(unpack_words(words, tile), codes)
    row, column = rows - 1, tiles * tile - 1 - seed % tile
    at, inside = divmod(column, tile)
    nibble, word = divmod(inside, tile // 4)
    assert words[row, at * tile // 4 + word] >> 4 * nibble & 15 == codes[row, column]
