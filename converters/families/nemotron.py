"""Nemotron-H and Nemotron 3: layers of one part each, Mamba 2, attention without rotation, MLP or mixture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lmdeploy_jax.converters.families.common import (
    ACTIVATION_NAMES,
    FULL,
    LINEAR,
    MOST_HEADS,
    decoder_config,
    head_size,
    known_kinds,
)
from lmdeploy_jax.converters.families.glm import sigmoid_mixture
from lmdeploy_jax.converters.families.mamba import mamba_of, mamba_rules
from lmdeploy_jax.converters.families.tables import FLAT_COLUMNS, LAYER_TARGET, kv_replicas, outer_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import GroupedQKV, Stack
from lmdeploy_jax.models.config import DecoderConfig, LayerConfig, MixtureConfig
from lmdeploy_jax.models.recurrent_config import Mamba2Config

MLP, MOE = "mlp", "moe"
PATTERN = {"M": LINEAR, "*": FULL, "-": MLP, "E": MOE}
LAYERS = r"backbone\.layers\."
UNUSED = (
    *("expand", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual"),
    *(
        "moe_shared_expert_overlap",
        "num_hidden_layers",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
    ),
)
"""Of training, of layers that predict several tokens, and how many layers there are, as their kinds say."""


def nemotron_h_config(fields: Fields) -> DecoderConfig:
    """HF `NemotronHConfig`."""
    kinds, mamba = _kinds(fields), _mamba(fields)
    for name in ("attention_bias", "mlp_bias", "use_bias"):
        if fields.flag(name, False):
            raise fields.unsupported(name, True, "false")
    for name in UNUSED:
        fields.get(name)
    block = {"activation": fields.require("mlp_hidden_act", ACTIVATION_NAMES, "relu2"), "gated": False}
    config = decoder_config(
        fields,
        head_dim=head_size(fields, fields.size("attention_head_dim", 128)),
        rope=None,
        recurrent=[mamba if kind == LINEAR else None for kind in kinds],
        mixture=_mixture(fields, block) if MOE in kinds else None,
        sparse=[kind != MLP for kind in kinds],
        mlp=block,
        norm_eps=fields.positive("layer_norm_epsilon", fields.positive("rms_norm_eps", 1e-5)),
    )
    return replace(config, layers=tuple(map(_alone, config.layers, kinds)))


def _kinds(fields: Fields) -> tuple[str, ...]:
    """Of each layer."""
    pattern, name = fields.get("hybrid_override_pattern"), "layers_block_type"
    types = fields.items(name, fields.items("layer_types", []))
    if not types:
        name, types = "hybrid_override_pattern", [PATTERN.get(letter, letter) for letter in str(pattern)]
    return known_kinds(fields, name, types, {kind: kind for kind in PATTERN.values()})


def _alone(layer: LayerConfig, kind: str) -> LayerConfig:
    return replace(layer, mixer=None) if kind in (MLP, MOE) else replace(layer, mlp=None)


def _mamba(fields: Fields) -> Mamba2Config:
    fields.require("mamba_hidden_act", {"silu": None, "swish": None}, "silu")
    return mamba_of(
        fields,
        heads=fields.size("mamba_num_heads", 128, most=MOST_HEADS),
        groups=fields.size("n_groups", 8),
        head_dim=fields.size("mamba_head_dim", 64),
        state_dim=fields.size("ssm_state_size", 128),
        taps=fields.size("conv_kernel", 4, least=2, most=64),
        conv_bias=fields.flag("use_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
    )


def _mixture(fields: Fields, block: dict[str, Any]) -> MixtureConfig:
    """DeepSeek V3's way of choosing, and blocks that are not gated."""
    groups = fields.size("n_group", 1), fields.size("topk_group", 1)
    mixture = sigmoid_mixture(
        fields, width=7688, experts=8, per_token=2, groups=groups, scale=1.0, expert=block
    )
    fields.get("n_shared_experts")
    shared = fields.size("moe_shared_expert_intermediate_size", 7688)
    latent = fields.optional_size("moe_latent_size", None)
    return replace(mixture, shared=replace(mixture.expert, width=shared), latent_size=latent)


def nemotron_h_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The one norm of a layer is that of its part."""
    mixer, mlp = LAYERS + r"(\d+)\.mixer\.", LAYER_TARGET + "mlp."
    qkv = Rule(
        mixer + r"(q|k|v)_proj\.weight",
        LAYER_TARGET + "attention.qkv.weight",
        r"\2",
        GroupedQKV(kv_replicas(config, tp)),
    )
    mixes = [layer.mixer is not None for layer in config.layers]
    return (
        *outer_rules(config, "backbone.embeddings", "lm_head"),
        Rule(r"backbone\.norm_f\.weight", "norm.weight"),
        _norm_rule((i for i, present in enumerate(mixes) if present), "attention_norm"),
        _norm_rule((i for i, present in enumerate(mixes) if not present), "mlp_norm"),
        qkv,
        Rule(mixer + r"o_proj\.weight", LAYER_TARGET + "attention.o.weight", "", FLAT_COLUMNS),
        Rule(mixer + r"(up|down)_proj\.weight", mlp + r"\2.weight"),
        Rule(mixer + r"shared_experts\.(up|down)_proj\.weight", mlp + r"shared.\2.weight"),
        *mamba_rules(config, tp, mixer),
        *_mixture_rules(config, mixer, mlp),
    )


def _norm_rule(layers: Iterable[int], target: str) -> Rule:
    numbers = "|".join(map(str, layers))
    return Rule(LAYERS + rf"({numbers})\.norm\.weight", LAYER_TARGET + f"{target}.weight")


def _mixture_rules(config: DecoderConfig, mixer: str, mlp: str) -> tuple[Rule, ...]:
    mixtures = (layer.mlp for layer in config.layers if isinstance(layer.mlp, MixtureConfig))
    (count,) = {mixture.router.experts for mixture in mixtures} or {0}
    numbers, expert = tuple(map(str, range(count))), mixer + r"experts\.(\d+)\."
    return (
        Rule(mixer + r"gate\.weight", mlp + "router.weight"),
        Rule(mixer + r"gate\.e_score_correction_bias", mlp + "router.correction"),
        Rule(expert + r"up_proj\.weight", mlp + "experts.gate_up.weight", r"\2", Stack(numbers, axes=2)),
        Rule(expert + r"down_proj\.weight", mlp + "experts.down.weight", r"\2", Stack(numbers)),
        Rule(mixer + r"fc1_latent_proj\.weight", mlp + "into_latent.weight"),
        Rule(mixer + r"fc2_latent_proj\.weight", mlp + "from_latent.weight"),
    )
