"""IBM Granite: a Llama with four multipliers."""

from __future__ import annotations

from lmdeploy_jax.converters.families.llama import llama_config
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def granite_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteConfig`."""
    return llama_config(
        fields,
        scale=fields.number("attention_multiplier", 1.0),
        layer={"residual_multiplier": fields.number("residual_multiplier", 1.0)},
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=1.0 / fields.positive("logits_scaling", 1.0),
    )
