"""Llama 4 (text): attention within chunks where queries rotate, and to everything where they do not; mixtures
whose experts' inputs are weighed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmdeploy_jax.converters.families.common import (
    FULL,
    check_widths,
    count_layers,
    decoder_config,
    head_size,
    mixer_kinds,
)
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Stack
from lmdeploy_jax.converters.stacked import StackedExperts
from lmdeploy_jax.models.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MixtureConfig,
    RopeConfig,
)

CHUNKED = "chunked_attention"
LLAMA4_STACKED = StackedExperts(transposed=True)
NAMES = MixtureNames("feed_forward", router="router", shared="shared_expert")


def llama4_config(fields: Fields) -> DecoderConfig:
    """HF `Llama4TextConfig`. A 1 in `no_rope_layers` is a layer that rotates."""
    head_dim, layers = head_size(fields, 128), count_layers(fields)
    width, bias = fields.size("intermediate_size_mlp", 16384), fields.flag("attention_bias", False)
    check_widths(fields, {"intermediate_size_mlp": width})
    rotates, unit = _rotating_layers(fields), fields.flag("use_qk_norm", True)
    chunk = fields.optional_size("attention_chunk_size", 8192)
    default = [CHUNKED if turns and chunk is not None else FULL for turns in rotates]
    chunks = mixer_kinds(fields, default, {FULL: None, CHUNKED: chunk})
    tempered = _temperature(fields)
    base = decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=500000.0),
        attention={"qkv_bias": bias, "o_bias": bias},
        mlp={"width": width},
        mixture=_mixture(fields),
        sparse=_sparse(fields, layers),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )

    def made(layer: LayerConfig, turns: bool, reach: int | None) -> LayerConfig:
        mixer = layer.mixer
        assert isinstance(mixer, AttentionConfig)
        options = replace(mixer.options, chunk=reach)
        rope = mixer.rope if turns else tempered
        own = replace(mixer, options=options, rope=rope, qk_norm=unit and turns, qk_norm_weight=False)
        return replace(layer, mixer=own)

    kinds = zip(base.layers, rotates, chunks, strict=True)
    return replace(base, layers=tuple(made(*kind) for kind in kinds))


def _rotating_layers(fields: Fields) -> tuple[bool, ...]:
    layers, interval = count_layers(fields), fields.size("no_rope_layer_interval", 4)
    rotates = fields.items("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])
    if len(rotates) < layers or not all(flag in (0, 1) for flag in rotates):
        raise fields.unsupported("no_rope_layers", rotates, f"{layers} entries, each 0 or 1")
    return tuple(bool(flag) for flag in rotates[:layers])


def _temperature(fields: Fields) -> RopeConfig | None:
    """By which queries grow with their position in layers that do not rotate."""
    scale, floor = fields.positive("attn_scale", 0.1), fields.size("floor_scale", 8192)
    if not fields.flag("attn_temperature_tuning", True):
        return None
    return RopeConfig(0, original_max_position=floor, llama_4_scaling_beta=scale, llama_4_scaling_offset=1)


def _mixture(fields: Fields) -> MixtureConfig:
    width = fields.size("intermediate_size", 8192)
    mixture = read_mixture(fields, width=width, shared=width, experts=16, per_token=1, scores="sigmoid")
    if mixture.router.per_token != 1:
        raise fields.unsupported("num_experts_per_tok", mixture.router.per_token, "1")
    return replace(mixture, weigh_inputs=True)


def _sparse(fields: Fields, layers: int) -> Sequence[bool]:
    step = fields.size("interleave_moe_layer_step", 1)
    chosen = fields.get("moe_layers")
    if chosen is None:
        return [(i + 1) % step == 0 for i in range(layers)]
    if not isinstance(chosen, list) or not all(i in range(layers) for i in chosen):
        raise fields.damaged("moe_layers", chosen, f"a list of numbers of the {layers} layers")
    return [i in chosen for i in range(layers)]


def llama4_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The usual names but for `feed_forward`, a mixture or an MLP."""
    block, target = LAYER + r"feed_forward\.", LAYER_TARGET + "mlp."
    return (
        *hf_rules(config, tp, interleaved=True),
        *NAMES.rules(config),
        Rule(block + r"(gate|up)_proj\.weight", target + "gate_up.weight", r"\2", Stack(("gate", "up"))),
        Rule(block + r"down_proj\.weight", target + "down.weight"),
    )
