"""What most families share: the names of a HuggingFace config's sizes, and how layers are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from lmdeploy_jax.converters.fields import LENGTHS, REQUIRED, Fields
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.config import (
    AttentionConfig,
    DecoderConfig,
    LatentConfig,
    LayerConfig,
    MixtureConfig,
    MlpConfig,
    RopeConfig,
)
from lmdeploy_jax.models.recurrent_config import RecurrentConfig
from lmdeploy_jax.pallas_kernels.options import AttentionOptions

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}
DEFAULT_LENGTH = 2048
T = TypeVar("T")
Features = Mapping[str, Any]
NONE: Features = MappingProxyType({})
MOST_LAYERS, MOST_HEADS = 10_000, 4096  # lists are made of so many entries before a tensor is looked at
MOST_ELEMENTS = 2**40  # of one weight
SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = "linear_attention"
OLD_KINDS = {"mamba": LINEAR, "attention": FULL}  # of layers, before transformers 5


def decoder_config(
    fields: Fields,
    *,
    rope: RopeConfig | None,
    head_dim: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    windows: Sequence[int | None] | None = None,
    local_rope: RopeConfig | None = None,
    rope_layers: Sequence[bool] | None = None,
    latent: LatentConfig | None = None,
    recurrent: Sequence[RecurrentConfig | None] | None = None,
    mixture: MixtureConfig | None = None,
    sparse: Sequence[bool] | None = None,
    attention: Features = NONE,
    mlp: Features = NONE,
    layer: Features = NONE,
    **features: Any,
) -> DecoderConfig:
    """A decoder whose layers differ in windows and rotations alone, of the fields that families name alike.

    scale, soft_cap: of the attention logits; by default 1 / sqrt(head_dim), and none.
    windows: each layer's; None: no layer has one. local_rope: that of the layers with a window, where it is
        another. rope_layers: which layers rotate at all.
    latent: what stands in the place of attention over q, k and v.
    recurrent: of each layer, what stands there in the place of any attention, or None; it says how many
        layers there are.
    mixture: what stands in the place of the MLP, in all layers or in those that are `sparse`.
    attention, mlp, layer, features: fields of `AttentionConfig`, `MlpConfig`, `LayerConfig`, `DecoderConfig`.
    """
    dense = mixture is None or not all(sparse or (True,))
    width = fields.size("intermediate_size", REQUIRED if dense or mixture is None else mixture.expert.width)
    check_widths(
        fields,
        {
            "vocab_size": fields.size("vocab_size"),
            "intermediate_size": width,
            "head_dim": head_dim * count_heads(fields),
        },
    )
    layers = count_layers(fields) if recurrent is None else len(recurrent)
    heads = {**_head_counts(fields), "head_dim": head_dim, **attention}
    block = MlpConfig(**{"width": width, **_activation(fields, mlp), **mlp})

    def made(
        window: int | None, rotates: bool, is_sparse: bool, state: RecurrentConfig | None
    ) -> LayerConfig:
        layer_rope = rope if window is None or local_rope is None else local_rope
        options = AttentionOptions(head_dim**-0.5 if scale is None else scale, window, soft_cap)
        plain = AttentionConfig(options=options, rope=layer_rope if rotates else None, **heads)
        mixer = state or latent or plain
        return LayerConfig(mixer, mixture if mixture is not None and is_sparse else block, **layer)

    none, every = (None,) * layers, (True,) * layers
    kinds = zip(windows or none, rope_layers or every, sparse or every, recurrent or none, strict=True)
    return DecoderConfig(layers=tuple(made(*kind) for kind in kinds), **_outer(fields, features))


def _head_counts(fields: Fields) -> Features:
    heads = count_heads(fields)
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.unsupported("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    return {"heads": heads, "kv_heads": kv_heads}


def _activation(fields: Fields, given: Features) -> Features:
    """`hidden_act`, unless the family reads another field."""
    known = "activation" in given
    return {} if known else {"activation": fields.require("hidden_act", ACTIVATION_NAMES, "silu")}


def _outer(fields: Fields, given: Features) -> Features:
    """What stands around the layers."""
    found: dict[str, Any] = {
        "hidden_size": fields.size("hidden_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position": longest_sequence(fields),
        "norm_eps": fields.positive("rms_norm_eps", 1e-6),
    }
    if "tie_embeddings" not in given:
        found["tie_embeddings"] = fields.flag("tie_word_embeddings", False)
    return {**found, **given}


def count_layers(fields: Fields) -> int:
    """`num_hidden_layers`."""
    return fields.size("num_hidden_layers", most=MOST_LAYERS)


def count_heads(fields: Fields) -> int:
    """`num_attention_heads`."""
    return fields.size("num_attention_heads", most=MOST_HEADS)


def check_widths(fields: Fields, widths: Mapping[str, int]) -> None:
    """No weight is of a size that nobody has: shapes are computed with before a tensor is looked at.

    widths: the axes of weights beside hidden_size, by the field that they come from.
    """
    hidden = fields.size("hidden_size")
    for name, width in widths.items():
        if hidden * width > MOST_ELEMENTS:
            raise CheckpointError(
                f"{fields.where}: hidden_size={hidden} and {name} ask for a weight of {hidden * width} "
                f"numbers; at most {MOST_ELEMENTS} can be read"
            )


def head_size(fields: Fields, default: int | None = None) -> int:
    """`head_dim`, or `default`, or the hidden size shared out over the heads."""
    hidden, heads = fields.size("hidden_size"), count_heads(fields)
    if default is None and fields.get("head_dim") is None and hidden % heads:
        raise fields.unsupported("num_attention_heads", heads, f"a divisor of hidden_size={hidden}")
    return fields.size("head_dim", default or hidden // heads)


def longest_sequence(fields: Fields) -> int:
    """The least of the lengths that the config names; rope scaling is not multiplied in."""
    return min((fields.size(name) for name in LENGTHS if fields.get(name)), default=DEFAULT_LENGTH)


def layer_windows(fields: Fields, default: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """One window a layer: `window` in the layers that `layer_types` (or else `default`) calls sliding."""
    types = fields.items("layer_types", list(default))
    layers = count_layers(fields)
    if len(types) != layers or not all(kind in (SLIDING, FULL) for kind in types):
        raise fields.unsupported("layer_types", types, f"{layers} entries, each {SLIDING!r} or {FULL!r}")
    if window is None and SLIDING in types:
        raise fields.unsupported("sliding_window", None, f"a size, as layer_types has {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind in types)


def mixer_kinds(fields: Fields, default: Sequence[str], known: Mapping[str, T]) -> tuple[T, ...]:
    """Of each layer what `known` gives for its kind in `layer_types` (or else in `default`)."""
    types, layers = fields.items("layer_types", list(default)), count_layers(fields)
    if len(types) != layers:
        raise fields.unsupported("layer_types", types, f"{layers} entries")
    return known_kinds(fields, "layer_types", types, known)


def known_kinds(fields: Fields, name: str, types: Sequence[Any], known: Mapping[str, T]) -> tuple[T, ...]:
    """What `known` gives for each of the layers' kinds, which field `name` says."""
    kinds = [OLD_KINDS.get(kind, kind) if isinstance(kind, str) else None for kind in types]
    if len(kinds) > MOST_LAYERS or not all(kind in known for kind in kinds):
        raise fields.unsupported(name, types, f"entries that are each one of {', '.join(known)}")
    if FULL not in kinds:
        raise fields.unsupported(name, types, f"one {FULL!r} at least")
    return tuple(known[kind] for kind in kinds if kind is not None)


def used_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`, where `use_sliding_window` says that it counts."""
    window = fields.optional_size("sliding_window", default)
    return window if fields.flag("use_sliding_window", False) else None
