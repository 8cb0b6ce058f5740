"""ByteDance Seed-OSS: a Llama with biases on q, k and v."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def seed_oss_config(fields: Fields) -> DecoderConfig:
    """HF `SeedOssConfig`; heads are 128 wide unless the config says otherwise."""
    head_dim = head_size(fields, 128)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        attention={
            "qkv_bias": fields.flag("attention_bias", True),
            "o_bias": fields.flag("attention_out_bias", False),
        },
        mlp={"bias": fields.flag("mlp_bias", False)},
    )
