"""RoPE settings of a HuggingFace config: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converters.families.fields import Fields
from lmdeploy_jax.models.config import ROPE_KINDS, RopeConfig

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
LENGTH = {"original_max_position_embeddings"}
KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"} | LENGTH,
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"} | LENGTH,
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    | LENGTH,
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"} | LENGTH,
}
"""What each kind may say; a null value says nothing."""


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """The RoPE of a config whose head size is `head_dim`. `theta`: the family's default base; `partial`: whether the
    family rotates a part of each head where `partial_rotary_factor` says so; `aliases`: names of kinds of its own.

    Raises UnsupportedModelError for kinds and keys that are not implemented.
    """
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = given.get("rope_theta") or fields.number("rope_theta", theta)
    share = given.get("partial_rotary_factor") or fields.number("partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise fields.unsupported("partial_rotary_factor", share, "1.0 for this architecture")
    return rope_from(fields, given, int(head_dim * share), float(theta), aliases or {})


def rope_from(
    fields: Fields, given: Mapping[str, Any], dim: int, theta: float, aliases: Mapping[str, str]
) -> RopeConfig:
    """The RoPE that the dictionary `given` describes; `fields` for the lengths and for errors."""
    named = given.get("rope_type") or given.get("type") or "default"
    kind = aliases.get(named, named)
    if kind not in ROPE_KINDS:
        raise fields.unsupported("rope_type", named, ", ".join(ROPE_KINDS))
    values = {key: value for key, value in given.items() if value is not None and key not in COMMON}
    for key in values.keys() - KEYS[kind]:
        raise fields.unsupported(
            f"{key} in rope_parameters", values[key], f"{sorted(KEYS[kind])} for {kind!r}"
        )
    return RopeConfig(dim=dim, kind=kind, theta=theta, **_settings(fields, kind, values, dim))


def _settings(fields: Fields, kind: str, values: Mapping[str, Any], dim: int) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": _number(fields, values, "factor")}
    if kind == "dynamic":
        longest = fields.size("max_position_embeddings", 2048)
        return {"factor": _number(fields, values, "factor"), "original_max_position": longest}
    original = fields.get("original_max_position_embeddings") or values.get(
        "original_max_position_embeddings"
    )
    original = original or fields.size("max_position_embeddings", 2048)
    made: dict[str, Any] = {"original_max_position": original}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return made | {name: _number(fields, values, name) for name in names}
    factor = values.get("factor") or fields.size("max_position_embeddings", 2048) / original
    if kind == "yarn":
        return (
            made
            | {"factor": factor, "attention_factor": _yarn_attention(values, factor)}
            | _yarn_range(values)
        )
    return (
        made
        | {"attention_factor": _longrope_attention(values, factor, original)}
        | _longrope(fields, values, dim)
    )


def _number(fields: Fields, values: Mapping[str, Any], name: str) -> float:
    return Fields(values, f"{fields.where}: rope_parameters").number(name)


def _yarn_range(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "beta_fast": float(values.get("beta_fast") or 32.0),
        "beta_slow": float(values.get("beta_slow") or 1.0),
        "truncate": bool(values.get("truncate", True)),
    }


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    """YaRN's recommended temperature, or DeepSeek's quotient of two."""
    if "attention_factor" in values:
        return float(values["attention_factor"])
    scale, scale_all = values.get("mscale"), values.get("mscale_all_dim")
    if scale and scale_all:
        return _mscale(factor, scale) / _mscale(factor, scale_all)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(fields: Fields, values: Mapping[str, Any], dim: int) -> dict[str, Any]:
    made = {name: tuple(values.get(name) or ()) for name in ("short_factor", "long_factor")}
    for name, factors in made.items():
        if len(factors) != dim // 2:
            raise fields.unsupported(f"{name} in rope_parameters", list(factors), f"{dim // 2} numbers")
    return made


def _longrope_attention(values: Mapping[str, Any], factor: float, original: int) -> float:
    if "attention_factor" in values:
        return float(values["attention_factor"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
