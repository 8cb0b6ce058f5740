"""The language models within released checkpoints that take images: their configs leave out what the classes
of transformers say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from tests.models.paged import named_leaves
from tests.oracle import save_checkpoint

GEMMA = {"model_type": "gemma3_text", "sliding_window": 1024,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma-3-4b-it": (
        "Gemma3ForConditionalGeneration", "gemma3",
        GEMMA | {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    ),
    "gemma-3-27b-it": (
        "Gemma3ForConditionalGeneration", "gemma3",
        GEMMA | {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "head_dim": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168},
    ),
    "llava-1.5-7b-hf": (
        "LlavaForConditionalGeneration", "llava",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-5, "vocab_size": 32064},
    ),
    "llava-v1.6-mistral-7b-hf": (
        "LlavaNextForConditionalGeneration", "llava_next",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "intermediate_size": 14336,
         "max_position_embeddings": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_what_a_released_config_leaves_out_is_what_transformers_says(name: str, tmp_path: Path) -> None:
    architecture, kind, part = PARTS[name]
    raw = {"architectures": [architecture], "model_type": kind, "text_config": part}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, theirs = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path).text_config
    mixer, block = ours.layers[0].mixer, ours.layers[0].mlp
    assert (ours.hidden_size, ours.vocab_size) == (theirs.hidden_size, theirs.vocab_size)
    assert (len(ours.layers), block.width) == (theirs.num_hidden_layers, theirs.intermediate_size)
    heads = theirs.num_attention_heads, theirs.num_key_value_heads
    assert (mixer.heads, mixer.kv_heads) == heads
    assert mixer.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads[0])
    windows = [layer.mixer.options.window for layer in ours.layers]
    sliding = getattr(theirs, "layer_types", None) or ["full_attention"] * len(windows)
    assert windows == [theirs.sliding_window if each == "sliding_attention" else None for each in sliding]


def test_qwen3_5_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Within a checkpoint that takes images: experts in one tensor, beside layers that predict further."""
    text, whole = save_checkpoint("qwen3_5_moe", tmp_path / "text"), tmp_path / "whole"
    part = json.loads((text / "config.json").read_text())
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
        "text_config": part | {"architectures": None, "attn_output_gate": True, "mamba_ssm_dtype": "float32",
                               "mtp_num_hidden_layers": 1},
        "vision_config": {"depth": 1},
    }))  # fmt: skip
    tensors = load_file(text / "model.safetensors")
    renamed = {
        name.replace("model.", "model.language_model."): value
        for name, value in tensors.items()
        if ".experts." not in name
    }
    for layer in range(part["num_hidden_layers"]):
        gate, up, down = (
            np.stack([tensors[f"model.layers.{layer}.mlp.experts.{i}.{name}_proj.weight"] for i in range(4)])
            for name in ("gate", "up", "down")
        )
        experts = f"model.language_model.layers.{layer}.mlp.experts."
        renamed[experts + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        renamed[experts + "down_proj"] = down
    for name in ("mtp.fc.weight", "model.visual.blocks.0.attn.qkv.weight"):
        renamed[name] = np.zeros((2, 2), np.float32)
    save_file(renamed, whole / "model.safetensors")
    ours, theirs = (named_leaves(load_model(folder)) for folder in (whole, text))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


WITHIN = {  # how the language model's tensors are called within
    "Gemma4ForConditionalGeneration": ("gemma4", "model.language_model.", "lm_head.", "vision_tower.w"),
    "Llama4ForConditionalGeneration": (
        "llama4", "language_model.model.", "language_model.lm_head.", "vision_model.layernorm_pre.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", WITHIN)
def test_the_language_model_of_one_that_takes_images(architecture: str, tmp_path: Path) -> None:
    family, model, head, other = WITHIN[architecture]
    text, whole = save_checkpoint(family, tmp_path / "text"), tmp_path / "whole"
    part = json.loads((text / "config.json").read_text())
    raw = {"architectures": [architecture], "model_type": "any", "vision_config": {"depth": 1},
           "text_config": part | {"architectures": None}}  # fmt: skip
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(raw))
    tensors = load_file(text / "model.safetensors")
    renamed = {
        name.replace("model.", model, 1).replace("lm_head.", head): value for name, value in tensors.items()
    }
    save_file(renamed | {other: np.zeros((2, 2), np.float32)}, whole / "model.safetensors")
    ours, theirs = (named_leaves(load_model(folder)) for folder in (whole, text))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
