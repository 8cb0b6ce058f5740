"""Llama 1 to 3.3, and what carries its architecture's name: Yi, DeepSeek LLM, Vicuna and others."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.common import NONE, Features, decoder_config, head_size
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def llama_config(fields: Fields, *, mlp: Features = NONE, **features: Any) -> DecoderConfig:
    """HF `LlamaConfig`; one flag puts biases on q, k, v and o. `mlp`, `features`: see `decoder_config`."""
    head_dim = head_size(fields)
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"bias": fields.flag("mlp_bias", False), **mlp},
        **features,
    )
