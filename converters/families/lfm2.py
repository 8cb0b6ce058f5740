"""LFM2: short convolutions between gates, and attention in every few layers; dense and mixtures."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    check_widths,
    count_heads,
    count_layers,
    decoder_config,
    head_size,
    mixer_kinds,
)
from lmdeploy_jax.converters.families.mixture import MixtureNames, mixture_rules, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import FLAT_COLUMNS, LAYER, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import HeadPieces, Piece, Rows, Stack
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.recurrent_config import ShortConvConfig

CONV = "conv"
NORMS = {"operator_norm": "attention_norm", "ffn_norm": "mlp_norm"}
NAMES = MixtureNames("feed_forward", correction="expert_bias", experts=("w1", "w3", "w2"))


def lfm2_config(fields: Fields) -> DecoderConfig:
    """HF `Lfm2Config`."""
    return _lfm2(fields, mlp={"width": _width(fields)})


def lfm2_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Lfm2MoeConfig`."""
    first = fields.size("num_dense_layers", 2, least=0)
    mixture = read_mixture(
        fields,
        width=fields.size("moe_intermediate_size", 1792),
        experts=32,
        per_token=4,
        scores="sigmoid",
        correction=fields.flag("use_expert_bias", True),
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    return _lfm2(fields, mixture=mixture, sparse=[i >= first for i in range(count_layers(fields))])


def _width(fields: Fields) -> int:
    """Of the MLP: published configs may give it before it is adjusted."""
    width = fields.size("block_ff_dim", fields.size("intermediate_size"))
    unit = fields.size("block_multiple_of", 256)
    factor = fields.positive("block_ffn_dim_multiplier", 1.0)
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(factor * int(2 * width / 3))
    check_widths(fields, {"intermediate_size": width + unit})
    return -(-width // unit) * unit


def _lfm2(fields: Fields, **features: Any) -> DecoderConfig:
    heads, layers, taps = count_heads(fields), count_layers(fields), fields.size("conv_L_cache", 3, least=2)
    hidden, head_dim = fields.size("hidden_size"), head_size(fields)
    if heads * head_dim != hidden:
        raise fields.unsupported("head_dim", head_dim, f"hidden_size={hidden} shared out over {heads} heads")
    conv = ShortConvConfig(heads, head_dim, taps, fields.flag("conv_bias", False))
    attends = fields.items("full_attn_idxs", list(range(layers)))
    default = [FULL if i in attends else CONV for i in range(layers)]
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=fields.positive("theta", 1e6)),
        recurrent=mixer_kinds(fields, default, {FULL: None, CONV: conv}),
        attention={"qk_norm": True},
        norm_eps=fields.positive("norm_eps", 1e-5),
        tie_embeddings=fields.flag("tie_embedding", fields.flag("tie_word_embeddings", True)),
        **features,
    )


def lfm2_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The names of both kinds of layers and of both kinds of blocks."""
    conv, target, mlp = LAYER + r"conv\.", LAYER_TARGET + "attention.", LAYER + r"feed_forward\."
    mixer = next((mixer for mixer in config.mixers if isinstance(mixer, ShortConvConfig)), None)
    size, total = (mixer.head_dim, config.hidden_size) if mixer else (1, 1)
    bcx = HeadPieces(tuple(Piece("", size, i * total) for i in range(3)))
    gate_up = Stack(("1", "3"))
    return (
        *mixture_rules(config, tp, names=NAMES, norms=NORMS, qk_norms=("q_layernorm", "k_layernorm")),
        Rule(r"model\.embedding_norm\.weight", "norm.weight"),
        Rule(LAYER + r"self_attn\.out_proj\.weight", target + "o.weight", "", FLAT_COLUMNS),
        Rule(conv + r"in_proj\.(weight|bias)", target + r"bcx.\2", "", bcx),
        Rule(conv + r"conv\.weight", target + "conv", "", Rows(2)),
        Rule(conv + r"conv\.bias", target + "conv_bias", "", Rows(2)),
        Rule(conv + r"out_proj\.weight", target + "o.weight", "", FLAT_COLUMNS),
        Rule(conv + r"out_proj\.bias", target + "o.bias"),
        Rule(mlp + r"w(1|3)\.weight", LAYER_TARGET + "mlp.gate_up.weight", r"\2", gate_up),
        Rule(mlp + r"w2\.weight", LAYER_TARGET + "mlp.down.weight"),
    )
