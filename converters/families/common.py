"""What most families share: the names of a HuggingFace config's sizes, and how layers are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.converters.families.fields import LENGTHS, Fields
from lmdeploy_jax.models.config import DecoderConfig, RopeConfig

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
DEFAULT_LENGTH = 2048
SLIDING, FULL = "sliding_attention", "full_attention"


def decoder_config(
    fields: Fields,
    *,
    rope: RopeConfig,
    head_dim: int,
    windows: Sequence[int | None] | None = None,
    **features: Any,
) -> DecoderConfig:
    """A `DecoderConfig` of the fields that all families name alike, and of `features`, which prevail."""
    heads, layers = fields.size("num_attention_heads"), fields.size("num_hidden_layers")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.unsupported("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    values: dict[str, Any] = {
        "hidden_size": fields.size("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position": longest_sequence(fields),
        "rope": rope,
        "rope_layers": (True,) * layers,
        "windows": (None,) * layers if windows is None else tuple(windows),
        "attention_scale": head_dim**-0.5,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
    }
    if "activation" not in features:
        values["activation"] = fields.require("hidden_act", ACTIVATION_NAMES, "silu")
    if "tie_embeddings" not in features:
        values["tie_embeddings"] = fields.flag("tie_word_embeddings", False)
    return DecoderConfig(**values | features)


def head_size(fields: Fields, default: int | None = None) -> int:
    """`head_dim`, or `default`, or the hidden size shared out over the heads."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if default is None and fields.get("head_dim") is None and hidden % heads:
        raise fields.unsupported("num_attention_heads", heads, f"a divisor of hidden_size={hidden}")
    return fields.size("head_dim", default or hidden // heads)


def longest_sequence(fields: Fields) -> int:
    """The least of the lengths that the config names; rope scaling is not multiplied in."""
    return min((fields.size(name) for name in LENGTHS if fields.get(name)), default=DEFAULT_LENGTH)


def layer_windows(fields: Fields, default: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """One window a layer: `window` in the layers that `layer_types` (or else `default`) calls sliding."""
    types = fields.get("layer_types") or default
    layers = fields.size("num_hidden_layers")
    if len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise fields.unsupported("layer_types", types, f"{layers} entries, each {SLIDING!r} or {FULL!r}")
    if window is None and SLIDING in types:
        raise fields.unsupported("sliding_window", None, f"a size, as layer_types has {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in types)


def used_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`, where `use_sliding_window` says that it counts."""
    window = fields.optional_size("sliding_window", default)
    return window if fields.flag("use_sliding_window", False) else None
