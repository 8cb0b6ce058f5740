"""gpt-oss: sinks in every head's softmax, windows on every other layer, biased experts, often in MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.mixture import MixtureNames, mixture_rules, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.stacked import StackedExperts
from lmdeploy_jax.models.config import DecoderConfig

ALPHA = 1.702
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GPT_OSS_STACKED = StackedExperts(interleaved=True, transposed=True)
gpt_oss_rules = partial(mixture_rules, names=MixtureNames(router="router"))


def gpt_oss_config(fields: Fields) -> DecoderConfig:
    """HF `GptOssConfig`."""
    head_dim, layers = head_size(fields, 64), count_layers(fields)
    if fields.number("swiglu_alpha", ALPHA) != ALPHA:
        raise fields.unsupported("swiglu_alpha", fields.get("swiglu_alpha"), str(ALPHA))
    limit = fields.positive("swiglu_limit", 7.0)
    bias = fields.flag("attention_bias", True)
    fields.get("experts_per_token")  # published configs say it twice
    windows = layer_windows(
        fields,
        [FULL if i % 2 else SLIDING for i in range(layers)],
        fields.optional_size("sliding_window", 128),
    )
    mixture = read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        experts=128,
        per_token=4,
        expert={"activation": "swigluoai", "limit": limit, "bias": True},
        scores="chosen",
        bias=True,
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=_rope(fields, head_dim),
        windows=windows,
        attention={"qkv_bias": bias, "o_bias": bias, "sinks": True},
        mixture=mixture,
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def _rope(fields: Fields, head_dim: int) -> Any:
    """As given; YaRN where nothing is."""
    given = fields.table("rope_scaling") or fields.table("rope_parameters") or YARN
    fields.get("initial_context_length")  # says again what YaRN's original length is
    whole = Fields({**fields.raw, "rope_scaling": given}, fields.where)
    return read_rope(whole, head_dim, theta=150000.0)
