"""Mamba 2 as most configs describe it, and the names of its tensors."""

from __future__ import annotations

import math
from typing import Any

from lmdeploy_jax.converters.families.common import MOST_HEADS, check_widths
from lmdeploy_jax.converters.families.tables import FLAT_COLUMNS, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import HeadPieces, Piece, Rows
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.recurrent_config import Mamba2Config

TRAINING = (
    "mamba_chunk_size",
    "chunk_size",
    "mamba_ssm_cache_dtype",
    "use_mamba_kernels",
    "num_logits_to_keep",
)
"""Fields that change no result: how a computation is cut, in what its state is kept, where it runs."""


def read_mamba(fields: Fields, inner: int, **features: Any) -> Mamba2Config:
    """The mixer of Bamba's fields, as Granite 4 and Falcon-H1 have them; `inner`: heads times their size."""
    heads = fields.size("mamba_n_heads", 128, most=MOST_HEADS)
    size = fields.get("mamba_d_head", "auto")
    head_dim = inner // heads if size in ("auto", None) else fields.size("mamba_d_head")
    if heads * head_dim != inner:
        raise fields.unsupported("mamba_d_head", size, f"{inner} divided by mamba_n_heads={heads}")
    fields.require("hidden_act", {"silu": None, "swish": None}, "silu")
    return mamba_of(
        fields,
        heads=heads,
        groups=fields.size("mamba_n_groups", 1),
        head_dim=head_dim,
        state_dim=fields.size("mamba_d_state", 256),
        taps=fields.size("mamba_d_conv", 4, least=2, most=64),
        conv_bias=fields.flag("mamba_conv_bias", True),
        bias=fields.flag("mamba_proj_bias", False),
        **features,
    )


def mamba_of(fields: Fields, **sizes: Any) -> Mamba2Config:
    """The mixer of such sizes, checked."""
    mixer = Mamba2Config(**sizes)
    if mixer.heads % mixer.groups:
        raise fields.unsupported("n_groups", mixer.groups, f"a divisor of {mixer.heads} heads")
    inner = mixer.heads * mixer.head_dim
    check_widths(fields, {"the Mamba heads": 2 * inner, "the Mamba state": mixer.groups * mixer.state_dim})
    _check_time_steps(fields)
    for name in TRAINING:
        fields.get(name)
    return mixer


def _check_time_steps(fields: Fields) -> None:
    """transformers applies limits to prompts and not to single tokens; all published models have none."""
    limit = fields.items("time_step_limit", [0.0, math.inf])
    if [_number(each) for each in limit] != [0.0, math.inf]:
        raise fields.unsupported("time_step_limit", limit, "[0.0, Infinity]")


def _number(value: Any) -> Any:
    """transformers 5 writes infinity as an object."""
    named = value.get("__float__") if isinstance(value, dict) else None
    return math.inf if named == "Infinity" else value


def mamba_rules(config: DecoderConfig, tp: int, block: str, *, target: str = "attention") -> tuple[Rule, ...]:
    """The rules for tensors whose names begin with `block`, a pattern; `target`: the part of the layer."""
    mixer = next(mixer for mixer in config.mixers if isinstance(mixer, Mamba2Config))
    into, total = LAYER_TARGET + target + ".", mixer.heads * mixer.head_dim
    conv = _xbc(mixer, tp, 0)
    per_group = mixer.per_group(tp)
    inputs = (
        *_xbc(mixer, tp, total),
        Piece("", per_group * mixer.head_dim),
        Piece("", per_group, 2 * (total + mixer.groups * mixer.state_dim)),
    )
    numbers = {"A_log": "a_log", "D": "d", "dt_bias": "dt_bias", r"norm\.weight": "norm"}
    return (
        Rule(block + r"in_proj\.(weight|bias)", into + r"xbczdt.\2", "", HeadPieces(inputs)),
        Rule(block + r"conv1d\.weight", into + "conv", "", HeadPieces(conv)),
        Rule(block + r"conv1d\.bias", into + "conv_bias", "", HeadPieces(conv)),
        *(Rule(block + name, into + leaf, "", Rows(2)) for name, leaf in numbers.items()),
        Rule(block + r"out_proj\.weight", into + "o.weight", "", FLAT_COLUMNS),
        Rule(block + r"out_proj\.bias", into + "o.bias"),
    )


def _xbc(mixer: Mamba2Config, tp: int, first: int) -> tuple[Piece, ...]:
    """x, B and C, which lie one behind the other, each of all groups, from row `first` on."""
    groups = mixer.held_groups(tp)
    inner, state, replicas = mixer.heads * mixer.head_dim, mixer.state_dim, groups // mixer.groups
    first_b = first + inner
    first_c = first_b + mixer.groups * state
    x = Piece("", inner // groups, first)
    return (x, Piece("", state, first_b, replicas), Piece("", state, first_c, replicas))
