"""RoPE settings of a HuggingFace config: `rope_parameters` (new), or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.converters.families.fields import Fields
from lmdeploy_jax.models.config import ROPE_KINDS, RopeConfig

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
LENGTH = "original_max_position_embeddings"
ATTENTION = {"attention_factor", "mscale", "mscale_all_dim"}
KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", LENGTH},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", LENGTH},
    "yarn": {"factor", "beta_fast", "beta_slow", "truncate", LENGTH} | ATTENTION,
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", LENGTH},
}
"""What each kind may say; a null value says nothing."""


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
) -> RopeConfig:
    """The RoPE of a config whose heads are `head_dim` wide.

    `theta` and `original` (context before scaling) are the family's defaults; `partial`: the family rotates a
    part of each head where `partial_rotary_factor` says so; `aliases`: its own names of kinds.
    Raises UnsupportedModelError for kinds and keys that are not implemented.
    """
    given = fields.table("rope_scaling") or fields.table("rope_parameters")
    outer = Fields(given, f"{fields.where}: rope_parameters")
    base = outer.number("rope_theta", fields.number("rope_theta", theta))
    share = outer.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share != 1.0 and not partial:
        raise fields.unsupported("partial_rotary_factor", share, "1.0 for this architecture")
    return rope_from(fields, given, int(head_dim * share), base, aliases=aliases, original=original)


def rope_from(
    fields: Fields,
    given: Mapping[str, Any],
    dim: int,
    theta: float,
    *,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
) -> RopeConfig:
    """The RoPE that `given` describes, turning `dim` elements of each head; lengths come from `fields`."""
    named = given.get("rope_type") or given.get("type") or "default"
    kind = ROPE_KINDS.get((aliases or {}).get(named, named))
    if kind is None:
        raise fields.unsupported("rope_type", named, ", ".join(ROPE_KINDS))
    said = {key: value for key, value in given.items() if value is not None and key not in COMMON}
    for key in sorted(said.keys() - KEYS[kind]):
        raise fields.unsupported(f"{key} in rope_parameters", said[key], f"{sorted(KEYS[kind])} for {kind!r}")
    values = Fields(said, f"{fields.where}: rope_parameters")
    return RopeConfig(dim=dim, kind=kind, theta=theta, **_settings(fields, values, kind, dim, original))


def _settings(fields: Fields, values: Fields, kind: str, dim: int, original: int | None) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": values.number("factor")}
    longest = fields.size("max_position_embeddings", 2048)
    if kind == "dynamic":
        return {"factor": values.number("factor"), "original_max_position": longest}
    original = fields.size(LENGTH, original or values.size(LENGTH, longest))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return {"original_max_position": original} | {name: values.number(name) for name in names}
    factor = values.number("factor", longest / original)
    special = _yarn(values, factor) if kind == "yarn" else _longrope(values, factor, original, dim)
    return {"original_max_position": original, "factor": factor} | special


def _yarn(values: Fields, factor: float) -> dict[str, Any]:
    return {
        "attention_factor": values.number("attention_factor", _yarn_temperature(values, factor)),
        "beta_fast": values.number("beta_fast", 32.0),
        "beta_slow": values.number("beta_slow", 1.0),
        "truncate": values.flag("truncate", True),
    }


def _yarn_temperature(values: Fields, factor: float) -> float:
    """YaRN's recommended temperature, or DeepSeek's quotient of two."""
    scale, scale_all = values.number("mscale", 0.0), values.number("mscale_all_dim", 0.0)
    if scale and scale_all:
        return _mscale(factor, scale) / _mscale(factor, scale_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(values: Fields, factor: float, original: int, dim: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        factors = values.get(name)
        if not isinstance(factors, list) or len(factors) != dim // 2:
            raise values.unsupported(name, factors, f"a list of {dim // 2} numbers")
        made[name] = tuple(map(float, factors))
    temperature = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return made | {"attention_factor": values.number("attention_factor", temperature)}
