"""Phi-3.5-MoE: LayerNorms and a head with biases, two experts by sparsemixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.converters.families.common import count_layers, decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, RopeConfig

PHIMOE_NAMES = MixtureNames("block_sparse_moe", experts=("w1", "w3", "w2"))
SCALES = ("short_mscale", "long_mscale")


def phimoe_config(fields: Fields) -> DecoderConfig:
    """HF `PhimoeConfig`."""
    head_dim = head_size(fields)
    if fields.size("num_experts_per_tok", 2) != 2:
        raise fields.unsupported(
            "num_experts_per_tok", fields.get("num_experts_per_tok"), "2, of sparsemixer"
        )
    jitter = fields.positive("router_jitter_noise", 0.01)
    bias = fields.flag("attention_bias", False)
    window = fields.optional_size("sliding_window", None)
    mixture = read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        experts=16,
        per_token=2,
        scores="sparsemixer",
        jitter=jitter,
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=_rope(fields, head_dim),
        windows=(window,) * count_layers(fields),
        attention={"qkv_bias": bias, "o_bias": bias},
        mixture=mixture,
        norm="layer",
        norm_bias=True,
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        head_bias=fields.flag("lm_head_bias", False),
    )


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    """longrope's factor of cos and sin is given twice, for short and long prompts."""
    given: Mapping[str, Any] = fields.table("rope_scaling") or fields.table("rope_parameters")
    scales = [given[name] for name in SCALES if given.get(name) is not None]
    if len(set(scales)) > 1:
        raise fields.unsupported("long_mscale", given["long_mscale"], f"short_mscale={given['short_mscale']}")
    rest = {name: value for name, value in given.items() if name not in SCALES}
    factor = {"attention_factor": scales[0]} if scales else {}
    for name in ("rope_scaling", "rope_parameters"):
        fields.get(name)
    whole = Fields({**fields.raw, "rope_scaling": {**rest, **factor}}, fields.where)
    return read_rope(whole, head_dim, theta=1e6, original=4096)
