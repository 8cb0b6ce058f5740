"""InternLM2, 2.5 (q, k and v in one tensor) and InternLM3."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def internlm2_config(fields: Fields) -> DecoderConfig:
    """`InternLM2Config` of the checkpoints' own code; `bias` is that of attention."""
    head_dim = head_size(fields)
    bias = fields.flag("bias", False)
    biases = {"qkv_bias": bias, "o_bias": bias}
    return decoder_config(fields, head_dim=head_dim, rope=read_rope(fields, head_dim), attention=biases)


def internlm3_config(fields: Fields) -> DecoderConfig:
    """`InternLM3Config` of the checkpoints (`qkv_bias`, `bias`) or of HF (`attention_bias`, `mlp_bias`)."""
    head_dim = head_size(fields)
    qkv_bias = fields.flag("qkv_bias", fields.flag("attention_bias", False))
    bias = fields.flag("bias", fields.flag("mlp_bias", False))
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        attention={"qkv_bias": qkv_bias, "o_bias": bias},
        mlp={"bias": bias},
    )
