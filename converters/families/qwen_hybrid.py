"""Qwen3-Next and Qwen3.5: three layers of gated DeltaNet for each one of gated attention."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    LINEAR,
    MOST_HEADS,
    check_widths,
    count_layers,
    decoder_config,
    head_size,
    mixer_kinds,
)
from lmdeploy_jax.converters.families.mixture import mixture_rules, read_mixture, sparse_layers
from lmdeploy_jax.converters.families.qwen import QWEN_NAMES, every_sparse_step
from lmdeploy_jax.converters.families.rope import Mrope, read_rope
from lmdeploy_jax.converters.families.tables import FLAT_COLUMNS, LAYER, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import HeadPieces, Piece, Rows
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig
from lmdeploy_jax.models.recurrent_config import DeltaConfig

MROPE = Mrope((11, 11, 10), interleaved=True)


def qwen3_next_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen3NextConfig`."""
    mixture = _mixture(fields, experts=512, per_token=10, normalise=fields.flag("norm_topk_prob", True))
    return _config(fields, mixture=mixture, sparse=sparse_layers(fields, every_sparse_step(fields)))


def qwen3_5_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen3_5TextConfig`."""
    _check_as_published(fields)
    return _config(fields, mrope=MROPE)


def qwen3_5_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen3_5MoeTextConfig`."""
    _check_as_published(fields)
    mixture = _mixture(fields, experts=256, per_token=8, normalise=True)
    return _config(fields, mrope=MROPE, mixture=mixture)


def _check_as_published(fields: Fields) -> None:
    """Fields of which transformers' classes know one value alone."""
    if not fields.flag("attn_output_gate", True):
        raise fields.unsupported("attn_output_gate", False, "true")
    fields.require("mamba_ssm_dtype", {"float32": None}, "float32")


def _mixture(fields: Fields, **given: Any) -> MixtureConfig:
    inner = fields.size("moe_intermediate_size", 512)
    shared = fields.size("shared_expert_intermediate_size", 512)
    return read_mixture(fields, width=inner, shared=shared, shared_gate=True, **given)


def _config(fields: Fields, *, mrope: Mrope | None = None, **features: Any) -> DecoderConfig:
    head_dim, every = head_size(fields, 256), fields.size("full_attention_interval", 4)
    default = [LINEAR if (i + 1) % every else FULL for i in range(count_layers(fields))]
    bias, delta = fields.flag("attention_bias", False), _delta(fields)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, partial=True, share=0.25, mrope=mrope),
        recurrent=mixer_kinds(fields, default, {FULL: None, LINEAR: delta}),
        attention={"qk_norm": True, "gated": True, "qkv_bias": bias, "o_bias": bias},
        norm_offset=1.0,
        **features,
    )


def _delta(fields: Fields) -> DeltaConfig:
    fields.require("hidden_act", {"silu": None, "swish": None}, "silu")
    heads = {
        name: fields.size(f"linear_num_{name}_heads", default, most=MOST_HEADS)
        for name, default in (("key", 16), ("value", 32))
    }
    if heads["value"] % heads["key"]:
        expected = f"a multiple of linear_num_key_heads={heads['key']}"
        raise fields.unsupported("linear_num_value_heads", heads["value"], expected)
    dims = {name: fields.size(f"linear_{name}_head_dim", 128) for name in ("key", "value")}
    check_widths(fields, {f"linear_{name}_head_dim": 2 * heads[name] * dims[name] for name in dims})
    taps = fields.size("linear_conv_kernel_dim", 4, least=2, most=64)
    return DeltaConfig(heads["key"], heads["value"], dims["key"], dims["value"], taps)


def qwen3_next_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """`in_proj_qkvz` and `in_proj_ba` lie by key head, as the model has them."""
    target = LAYER_TARGET + "attention."
    return _rules(
        config,
        tp,
        Rule(LAYER + r"linear_attn\.in_proj_qkvz\.weight", target + "qkvz.weight", "", Rows(2)),
        Rule(LAYER + r"linear_attn\.in_proj_ba\.weight", target + "ba.weight", "", Rows(2)),
    )


def qwen3_5_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """q, k, v, gates, strengths and decays lie one behind the other, each of all heads."""
    target, delta = LAYER_TARGET + "attention.", _delta_of(config)
    values = delta.per_key * delta.value_dim
    qkvz = HeadPieces((*_qkv(delta, "qkv"), Piece("z", values)))
    ba = HeadPieces((Piece("b", delta.per_key), Piece("a", delta.per_key)))
    return _rules(
        config,
        tp,
        Rule(LAYER + r"linear_attn\.in_proj_(qkv|z)\.weight", target + "qkvz.weight", r"\2", qkvz),
        Rule(LAYER + r"linear_attn\.in_proj_(b|a)\.weight", target + "ba.weight", r"\2", ba),
    )


def _rules(config: DecoderConfig, tp: int, *projections: Rule) -> tuple[Rule, ...]:
    mixer, target = LAYER + r"linear_attn\.", LAYER_TARGET + "attention."
    conv = HeadPieces(_qkv(_delta_of(config), ""))
    return (
        *mixture_rules(config, tp, names=QWEN_NAMES),
        *projections,
        Rule(mixer + r"conv1d\.weight", target + "conv", "", conv),
        Rule(mixer + r"A_log", target + "a_log", "", Rows(2)),
        Rule(mixer + r"dt_bias", target + "dt_bias", "", Rows(2)),
        Rule(mixer + r"norm\.weight", target + "norm.weight"),
        Rule(mixer + r"out_proj\.weight", target + "o.weight", "", FLAT_COLUMNS),
    )


def _delta_of(config: DecoderConfig) -> DeltaConfig:
    return next(mixer for mixer in config.mixers if isinstance(mixer, DeltaConfig))


def _qkv(delta: DeltaConfig, part: str) -> tuple[Piece, ...]:
    """Queries, keys and values, each of all heads, in one source."""
    keys, values = delta.key_heads * delta.key_dim, delta.per_key * delta.value_dim
    return (
        Piece(part, delta.key_dim),
        Piece(part, delta.key_dim, first=keys),
        Piece(part, values, first=2 * keys),
    )
