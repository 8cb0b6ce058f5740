"""StarCoder2: LayerNorms, an MLP that is not gated, biases everywhere."""

from __future__ import annotations

from functools import partial

from lmdeploy_jax.converters.families.common import (
    ACTIVATION_NAMES,
    count_layers,
    decoder_config,
    head_size,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

starcoder2_rules = partial(hf_rules, plain_mlp=("c_fc", "c_proj"))


def starcoder2_config(fields: Fields) -> DecoderConfig:
    """HF `Starcoder2Config`."""
    head_dim = head_size(fields)
    bias = fields.flag("use_bias", True)
    activation = fields.require("hidden_act", ACTIVATION_NAMES, "gelu_pytorch_tanh")
    window = fields.optional_size("sliding_window", None)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=(window,) * count_layers(fields),
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"gated": False, "bias": bias, "activation": activation},
        norm="layer",
        norm_bias=True,
        norm_eps=fields.positive("norm_epsilon", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )
