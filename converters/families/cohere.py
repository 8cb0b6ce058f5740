"""Cohere's Command R and A: attention and MLP side by side, one LayerNorm before both, rotation in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    NONE,
    SLIDING,
    Features,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.mixture import mixture_rules, read_mixture, sparse_layers
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig

NORMS = {"input_layernorm": "attention_norm"}
cohere_rules = partial(hf_rules, norms=NORMS, interleaved=True)
cohere_moe_rules = partial(mixture_rules, norms=NORMS, interleaved=True)


def cohere_config(fields: Fields) -> DecoderConfig:
    """HF `CohereConfig`; Command R+ has norms of q and k."""
    normed = fields.flag("use_qk_norm", False)
    return _cohere(fields, None, None, attention={"qk_norm": normed, "qk_layer_norm": normed})


def cohere2_config(fields: Fields) -> DecoderConfig:
    """HF `Cohere2Config`: three of four layers have a window and rotate, the others neither."""
    layers = count_layers(fields)
    pattern = fields.size("sliding_window_pattern", 4)
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    windows = layer_windows(fields, default, fields.optional_size("sliding_window", 4096))
    if fields.flag("use_qk_norm", False):
        raise fields.unsupported("use_qk_norm", True, "false")
    fields.get("rotary_pct")
    return _cohere(fields, windows, [window is not None for window in windows])


def cohere2_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Cohere2MoeConfig`: the first layers are dense, and of other windows."""
    layers, dense = count_layers(fields), fields.size("first_k_dense_replace", 0, least=0)
    sparse = sparse_layers(fields, [i >= dense for i in range(layers)])
    first, later = (
        fields.size(name, default)
        for name, default in (("prefix_dense_sliding_window_pattern", 1), ("sliding_window_pattern", 4))
    )
    kinds = [SLIDING if (i + 1) % first else FULL for i in range(min(dense, layers))]
    kinds += [SLIDING if (i + 1) % later else FULL for i in range(layers - len(kinds))]
    windows = layer_windows(fields, kinds, fields.optional_size("sliding_window", 4096))
    rotates = [
        window is not None or (first == 1 and not is_sparse)
        for window, is_sparse in zip(windows, sparse, strict=True)
    ]
    width = fields.size("intermediate_size")
    eps = fields.optional_number("rms_norm_eps", None)
    rms: dict[str, Any] = {} if eps is None else {"norm": "rms", "norm_eps": eps}
    return _cohere(
        fields,
        windows,
        rotates,
        theta=10000.0,
        head=128,
        mlp={"width": fields.size("prefix_dense_intermediate_size", width)},
        mixture=_mixture(fields, width),
        sparse=sparse,
        **rms,
    )


def _mixture(fields: Fields, width: int) -> MixtureConfig:
    kinds = {"softmax": "chosen", "sigmoid": "sigmoid"}
    scores = fields.require("expert_selection_fn", kinds, "softmax")
    shared = width * fields.size("num_shared_experts", 0, least=0)
    strategies = {"average": 0.5, "sum": 1.0}
    share = fields.require("shared_expert_combination_strategy", strategies, "average") if shared else 1.0
    normalise = fields.flag("norm_topk_prob", True) and scores == "sigmoid"
    mixture = read_mixture(
        fields,
        width=width,
        shared=shared,
        experts=8,
        per_token=2,
        scores=scores,
        normalise=normalise,
        scale=share,
    )
    return replace(mixture, shared_scale=share)


def _cohere(
    fields: Fields,
    windows: Sequence[int | None] | None,
    rope_layers: Sequence[bool] | None,
    *,
    theta: float = 500000.0,
    head: int | None = None,
    attention: Features = NONE,
    **features: Any,
) -> DecoderConfig:
    head_dim = head_size(fields, head)
    bias = fields.flag("attention_bias", False)
    norm = {"norm": "layer", "norm_eps": fields.positive("layer_norm_eps", 1e-5)}
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=theta),
        windows=windows,
        rope_layers=rope_layers,
        attention={"qkv_bias": bias, "o_bias": bias, **attention},
        layer={"parallel": True},
        logit_multiplier=fields.positive("logit_scale", 0.0625),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        **{**norm, **features},
    )
