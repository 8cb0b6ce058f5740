"""Baidu ERNIE 4.5, dense and mixtures: neighbours rotate in pairs."""

from __future__ import annotations

from functools import partial

from lmdeploy_jax.converters.families.common import count_layers, decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import (
    MixtureNames,
    mixture_rules,
    read_mixture,
    sparse_layers,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

NAMES = MixtureNames(correction="moe_statics.e_score_correction_bias", correction_row_axes=0)
ernie_rules = partial(hf_rules, interleaved=True)
ernie_moe_rules = partial(mixture_rules, names=NAMES, interleaved=True)


def ernie_config(fields: Fields) -> DecoderConfig:
    """HF `Ernie4_5Config`."""
    head_dim = head_size(fields, 128)
    bias = fields.flag("use_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=500000.0),
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"bias": bias},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def ernie_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Ernie4_5_MoeConfig`."""
    head_dim = head_size(fields)
    if fields.flag("use_bias", False):
        raise fields.unsupported("use_bias", True, "false")
    inner = fields.size("moe_intermediate_size", 1536)
    mixture = read_mixture(
        fields,
        width=inner,
        shared=inner * fields.size("moe_num_shared_experts", 2, least=0),
        experts=64,
        per_token=6,
        normalise=True,
        correction=True,
        float32=True,
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=500000.0),
        mixture=mixture,
        sparse=_sparse(fields),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _sparse(fields: Fields) -> tuple[bool, ...]:
    layers, step = count_layers(fields), fields.size("moe_layer_interval", 1)
    first, last = fields.size("moe_layer_start_index", 1, least=0), fields.get("moe_layer_end_index", -1)
    last = layers - 1 if last in (-1, None) else fields.size("moe_layer_end_index")
    return sparse_layers(fields, [first <= i <= last and (i + 1) % step == 0 for i in range(layers)])
