"""Gemma 4 (text): heads of two sizes, layers that read an earlier one's keys and values, inputs of each
layer's own, and mixtures beside the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmdeploy_jax.converters.families.common import (
    ACTIVATION_NAMES,
    FULL,
    MOST_HEADS,
    SLIDING,
    check_widths,
    count_heads,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.gemma import NORMS
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture
from lmdeploy_jax.converters.families.rope import rope_from
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import GroupedQKV, Rows
from lmdeploy_jax.models.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MixtureConfig,
    MlpConfig,
    PerLayerInputConfig,
    RopeConfig,
)

ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
NAMES = MixtureNames(block="", router="router.proj")
BLOCK_NORMS = {
    "post_feedforward_layernorm_1": "mlp.shared_post_norm",
    "pre_feedforward_layernorm_2": "mlp.experts_norm",
    "post_feedforward_layernorm_2": "mlp.experts_post_norm",
}
ROUTER = (
    Rule(LAYER + r"router\.scale", LAYER_TARGET + "mlp.router_norm.weight"),
    Rule(LAYER + r"router\.per_expert_scale", LAYER_TARGET + "mlp.router.expert_scale"),
)


def gemma4_config(fields: Fields) -> DecoderConfig:
    """HF `Gemma4TextConfig`."""
    both_ways = fields.get("use_bidirectional_attention") == "vision"
    if fields.get("use_bidirectional_attention") == "all":
        raise fields.unsupported("use_bidirectional_attention", "all", "null, or vision")
    head_dim, layers = head_size(fields, 256), count_layers(fields)
    default = [SLIDING if (i + 1) % 6 and i + 1 < layers else FULL for i in range(layers)]
    windows = layer_windows(fields, default, fields.size("sliding_window", 512))
    activation = fields.require("hidden_activation", ACTIVATION_NAMES, "gelu_pytorch_tanh")
    bias, shared = fields.flag("attention_bias", False), _shared_layers(fields, windows)
    base = decoder_config(
        fields,
        head_dim=head_dim,
        rope=_rope(fields, SLIDING, head_dim),
        windows=windows,
        scale=1.0,
        attention={"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "v_norm": True},
        mlp={"activation": activation},
        layer={
            "post_norm": True,
            "layer_scalar": True,
            "per_layer_input": _per_layer_input(fields, activation),
        },
        logit_soft_cap=fields.optional_number("final_logit_softcapping", None),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_multiplier=fields.size("hidden_size") ** 0.5,
    )
    wide = fields.flag("use_double_wide_mlp", False)
    full, mixture = _full_attention(fields), _mixture(fields, activation)

    def made(
        layer: LayerConfig, window: int | None, source: int | None, sizes: dict[str, Any]
    ) -> LayerConfig:
        assert isinstance(layer.mixer, AttentionConfig)
        assert isinstance(layer.mlp, MlpConfig)
        block = replace(layer.mlp, width=2 * layer.mlp.width) if wide and source is not None else layer.mlp
        causal = window is None and both_ways
        mixer = replace(layer.mixer, shared_layer=source, causal=causal, **(sizes if window is None else {}))
        feed_forward = block if mixture is None else replace(mixture, shared=block)
        return replace(layer, mixer=mixer, mlp=feed_forward)

    kinds = zip(base.layers, windows, shared, full, strict=True)
    return replace(base, layers=tuple(made(*kind) for kind in kinds))


def _rope(fields: Fields, kind: str, head_dim: int) -> RopeConfig:
    given = fields.table("rope_parameters") or ROPES
    each = Fields(given, f"{fields.where}: rope_parameters")
    if given.keys() - ROPES.keys():
        raise fields.unsupported(
            "rope_parameters", given, f"{FULL} and {SLIDING}, each with its own settings"
        )
    settings = each.table(kind) or ROPES[kind]
    theta = Fields(settings, each.where).positive("rope_theta", ROPES[kind]["rope_theta"])
    rope = rope_from(fields, settings, head_dim, theta)
    if rope.depends_on_length:
        raise fields.unsupported(f"rope_type of {kind}", rope.kind, "kinds that ignore the length")
    return rope


def _full_attention(fields: Fields) -> list[dict[str, Any]]:
    """Of each layer, what its attention is made of without a window; newer configs say it layer by layer."""
    heads, kv_heads = count_heads(fields), fields.size("num_key_value_heads", 4)
    head_dim, by_layer = fields.size("global_head_dim", 512), fields.table("per_layer_config")
    many = fields.optional_size("num_global_key_value_heads", None) if _keys_are_values(fields) else None
    own = {"head_dim": head_dim, "num_key_value_heads": many or kv_heads}
    found = []
    for i in range(count_layers(fields)):
        given = by_layer.get(str(i), {} if by_layer else own)
        each = Fields(given, f"{fields.where}: per_layer_config.{i}")
        size = each.size("head_dim", head_size(fields, 256))
        count = each.size("num_key_value_heads", kv_heads, most=MOST_HEADS)
        if heads % count:
            raise each.unsupported("num_key_value_heads", count, f"a divisor of num_attention_heads={heads}")
        check_widths(fields, {"global_head_dim": size * heads})
        rope = _rope(fields, FULL, size)
        found.append({"head_dim": size, "kv_heads": count, "rope": rope, "k_eq_v": _keys_are_values(fields)})
    return found


def _keys_are_values(fields: Fields) -> bool:
    return fields.flag("attention_k_eq_v", False)


def _shared_layers(fields: Fields, windows: Sequence[int | None]) -> list[int | None]:
    """Of each layer, the one whose keys and values it reads: of the last ones, the nearest of its kind."""
    count = fields.size("num_kv_shared_layers", 0, least=0)
    first = len(windows) - count
    if count and not set(windows) <= set(windows[: max(first, 0)]):
        expected = f"fewer than {len(windows)}, behind a layer of each kind"
        raise fields.unsupported("num_kv_shared_layers", count, expected)
    last = {window: i for i, window in enumerate(windows[:first])}
    return [None if i < first else last[window] for i, window in enumerate(windows)]


def _per_layer_input(fields: Fields, activation: Any) -> PerLayerInputConfig | None:
    width = fields.size("hidden_size_per_layer_input", 256, least=0)
    rows = fields.size("vocab_size_per_layer_input", 262144)
    check_widths(fields, {"vocab_size_per_layer_input": rows * width * count_layers(fields)} if width else {})
    pad = fields.size("pad_token_id", 0, least=0)
    return PerLayerInputConfig(width, rows, pad, activation) if width else None


def _mixture(fields: Fields, activation: Any) -> MixtureConfig | None:
    if not fields.flag("enable_moe_block", False):
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            fields.get(name)
        return None
    mixture = read_mixture(
        fields,
        width=fields.size("moe_intermediate_size"),
        per_token=fields.size("top_k_experts"),
        expert={"activation": activation},
        normalise=True,
        expert_scale=True,
    )
    return replace(mixture, beside=True)


def gemma4_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """Four norms a layer, and seven beside a mixture."""
    mixture = isinstance(config.layers[0].mlp, MixtureConfig)
    usual = hf_rules(
        config,
        tp,
        norms={**NORMS, **BLOCK_NORMS} if mixture else NORMS,
        attention=_attention_rules(config, tp),
        mlp="mlp.shared" if mixture else "mlp",
    )
    rules = (*usual, Rule(LAYER + "layer_scalar", LAYER_TARGET + "layer_scalar"))
    rules += _per_layer_input_rules(config)
    return (*rules, *NAMES.rules(config), *ROUTER) if mixture else rules


def _attention_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """For each kind of layer: queries alone where it shares, no values where those are the keys."""
    kinds: dict[AttentionConfig, list[str]] = {}
    for i, layer in enumerate(config.layers):
        assert isinstance(layer.mixer, AttentionConfig)
        kinds.setdefault(layer.mixer, []).append(str(i))
    target = LAYER_TARGET + "attention."
    rules = [Rule(LAYER + r"self_attn\.q_norm\.weight", target + "q_norm.weight")]
    for mixer, layers in kinds.items():
        block = rf"model\.layers\.({'|'.join(layers)})\.self_attn\."
        if mixer.shared_layer is not None:
            rules.append(Rule(block + r"q_proj\.(weight|bias)", target + r"qkv.\2", "", Rows(3)))
            rules.append(Rule(block + r"(?:k_proj|v_proj|k_norm|v_norm)\..*", None))
            continue
        packing = GroupedQKV(mixer.held_kv_heads(tp) // mixer.kv_heads, values=not mixer.k_eq_v)
        rules.append(Rule(block + r"(q|k|v)_proj\.(weight|bias)", target + r"qkv.\3", r"\2", packing))
        rules.append(Rule(block + r"k_norm\.weight", target + "k_norm.weight"))
    return tuple(rules)


def _per_layer_input_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    own, layer = "per_layer_inputs.", LAYER_TARGET + "per_layer_input."
    given = config.per_layer_input
    table = Rows(valid=given.vocab_size if given else None)
    return (
        Rule(LAYER + r"per_layer_input_gate\.weight", layer + "gate.weight"),
        Rule(LAYER + r"per_layer_projection\.weight", layer + "projection.weight"),
        Rule(LAYER + r"post_per_layer_input_norm\.weight", layer + "norm.weight"),
        Rule(r"model\.embed_tokens_per_layer\.weight", own + "embedding.weight", "", table),
        Rule(r"model\.per_layer_model_projection\.weight", own + "projection.weight"),
        Rule(r"model\.per_layer_projection_norm\.weight", own + "norm.weight"),
    )
