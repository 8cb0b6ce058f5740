"""The language models within released checkpoints that take images: their configs leave out what the classes
of transformers say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lmdeploy_jax.converters.config import read_config

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
