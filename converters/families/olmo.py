"""AI2's OLMo 2 and 3 (norms behind each block and none before, norms over all of q and of k), OLMoE, and
FlexOlmo, which is both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.mixture import mixture_rules, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope, rope_from
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig, RopeConfig

POST_NORMS: Mapping[str, str] = {
    "post_attention_layernorm": "attention_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
WIDE = {"qk_norm": True, "qk_norm_width": True}
post_norm_rules = partial(hf_rules, norms=POST_NORMS)
flex_olmo_rules = partial(mixture_rules, norms=POST_NORMS)


def olmo2_config(fields: Fields) -> DecoderConfig:
    """HF `Olmo2Config`."""
    head_dim = head_size(fields)
    return _post_normed(fields, head_dim, read_rope(fields, head_dim))


def olmo3_config(fields: Fields) -> DecoderConfig:
    """HF `Olmo3Config`: three of four layers have a window, and RoPE is scaled in the others alone."""
    head_dim, layers = head_size(fields), count_layers(fields)
    default = [SLIDING if (i + 1) % 4 else FULL for i in range(layers)]
    windows = layer_windows(fields, default, fields.optional_size("sliding_window", 4096))
    full, local = (_rope(fields, head_dim, kind) for kind in (FULL, SLIDING))
    return _post_normed(fields, head_dim, full, windows=windows, local_rope=local)


def _post_normed(
    fields: Fields,
    head_dim: int,
    rope: RopeConfig,
    *,
    windows: tuple[int | None, ...] | None = None,
    local_rope: RopeConfig | None = None,
    mixture: MixtureConfig | None = None,
) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=rope,
        windows=windows,
        local_rope=local_rope,
        mixture=mixture,
        attention={"qkv_bias": bias, "o_bias": bias, **WIDE},
        layer={"pre_norm": False, "post_norm": True},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def _rope(fields: Fields, head_dim: int, kind: str) -> RopeConfig:
    """That of one kind of layer; `rope_scaling`, of older configs, is of the full ones."""
    ropes = fields.table("rope_parameters")
    given = dict(Fields(ropes, f"{fields.where}: rope_parameters").table(kind))
    if kind == FULL:
        given |= fields.table("rope_scaling")
    theta = fields.positive("rope_theta", 500000.0)
    theta = Fields(given, f"{fields.where}: rope_parameters: {kind}").positive("rope_theta", theta)
    return rope_from(fields, given, head_dim, theta)


def olmoe_config(fields: Fields) -> DecoderConfig:
    """HF `OlmoeConfig`, of mixtures after norms."""
    head_dim = head_size(fields)
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        attention={"qkv_bias": bias, "o_bias": bias, **WIDE},
        mixture=_mixture(fields, experts=64, per_token=8),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def flex_olmo_config(fields: Fields) -> DecoderConfig:
    """HF `FlexOlmoConfig`: OLMoE's mixtures between OLMo 2's norms."""
    head_dim = head_size(fields)
    mixture = _mixture(fields, experts=7, per_token=5)
    return _post_normed(fields, head_dim, read_rope(fields, head_dim, theta=500000.0), mixture=mixture)


def _mixture(fields: Fields, *, experts: int, per_token: int) -> MixtureConfig:
    return read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        experts=experts,
        per_token=per_token,
        normalise=fields.flag("norm_topk_prob", False),
    )
