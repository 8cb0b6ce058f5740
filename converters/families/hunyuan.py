"""Tencent Hunyuan, dense and mixtures: norms of q and k come behind the rotation, but for Hy3's."""

from __future__ import annotations

from functools import partial
from typing import Any

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import MixtureNames, after_dense, mixture_rules, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, RopeConfig

QK_NORMS = ("query_layernorm", "key_layernorm")
NAMES = MixtureNames(router="gate.wg", shared="shared_mlp")
ONES = ("num_shared_expert", "cla_share_factor")
HY_V3_NAMES = MixtureNames(router="router.gate", correction="expert_bias", shared="shared_mlp")
hunyuan_rules = partial(hf_rules, qk_norms=QK_NORMS)
hunyuan_moe_rules = partial(mixture_rules, names=NAMES, qk_norms=QK_NORMS)


def hunyuan_config(fields: Fields, **mixture: Any) -> DecoderConfig:
    """HF `HunYuanDenseV1Config`."""
    head_dim = head_size(fields)
    bias = fields.flag("attention_bias", False)
    for name in ("use_qk_norm", "qk_norm"):
        if not fields.flag(name, True):
            raise fields.unsupported(name, False, "true")
    if fields.flag("use_cla", False):
        raise fields.unsupported("use_cla", True, "false")
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=_rope(fields, head_dim),
        attention={"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "qk_norm_after_rope": True},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        **mixture,
    )


def hunyuan_moe_config(fields: Fields) -> DecoderConfig:
    """HF `HunYuanMoEV1Config`; numbers may be lists that say the same for every layer."""
    alike = {name: _alike(fields, name) for name in ("num_experts", "moe_topk", "moe_intermediate_size")}
    width = fields.size("intermediate_size")
    if alike["moe_intermediate_size"] not in (None, width):
        raise fields.unsupported("moe_intermediate_size", alike["moe_intermediate_size"], str(width))
    for name in ONES:
        if _alike(fields, name) not in (None, 1):
            raise fields.unsupported(name, fields.get(name), "1")
    whole = Fields({**fields.raw, **alike}, fields.where)
    mixture = read_mixture(
        whole, width=width, shared=width, experts=1, per_token=1, normalise=True, float32=True
    )
    return hunyuan_config(fields, mixture=mixture)


def hy_v3_config(fields: Fields) -> DecoderConfig:
    """HF `HYV3Config`."""
    head_dim = head_size(fields, 128)
    bias = fields.flag("attention_bias", False)
    inner = fields.size("moe_intermediate_size", 1536)
    fields.get("enable_moe_fp32_combine")  # sums are always made in float32
    mixture = read_mixture(
        fields,
        width=inner,
        shared=inner * fields.size("num_shared_experts", 1, least=0),
        experts=192,
        per_token=8,
        scores="sigmoid",
        normalise=True,
        scale=fields.number("router_scaling_factor", 2.826),
        correction=True,
        float32=True,
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=11158840.0),
        attention={"qkv_bias": bias, "o_bias": bias, "qk_norm": True},
        mixture=mixture,
        sparse=after_dense(fields, 1),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def _alike(fields: Fields, name: str) -> Any:
    """A number, or what all entries of a list are."""
    value = fields.get(name)
    if not isinstance(value, list):
        return value
    if not value or any(entry != value[0] for entry in value):
        raise fields.unsupported(name, value, "the same for all layers")
    return value[0]


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    """A `dynamic` RoPE with an `alpha` stretches theta once and for all."""
    given = fields.table("rope_scaling") or fields.table("rope_parameters")
    kind = given.get("rope_type") or given.get("type")
    if kind != "dynamic" or not given.get("alpha"):
        return read_rope(fields, head_dim)
    alpha = Fields(given, f"{fields.where}: rope_scaling").positive("alpha")
    base = given.get("rope_theta") or fields.positive("rope_theta", 10000.0)
    theta = base * alpha ** (head_dim / (head_dim - 2))
    return read_rope(Fields({"rope_theta": theta}, fields.where), head_dim)
