"""RoPE settings of a HuggingFace config: `rope_parameters` (new), or `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.errors import UnsupportedModelError
from lmdeploy_jax.models.config import ROPE_KINDS, RopeConfig

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
LENGTH = "original_max_position_embeddings"
MSCALES = ("mscale", "mscale_all_dim")
ATTENTION = {"attention_factor", *MSCALES}
KEYS: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", LENGTH},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", LENGTH},
    "yarn": {"factor", "beta_fast", "beta_slow", "truncate", LENGTH} | ATTENTION,
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", LENGTH},
    "proportional": {"factor"},
}
"""What each kind may say; a null value says nothing."""
MROPE = {"mrope_section", "mrope_interleaved"}


@dataclass(frozen=True)
class Mrope:
    """A family's M-RoPE, as the fields of `RopeConfig` have it; a config may have another section."""

    section: tuple[int, int, int]
    interleaved: bool = False


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
    share: float = 1.0,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
    mrope: Mrope | None = None,
) -> RopeConfig:
    """The RoPE of a config whose heads are `head_dim` wide.

    `theta`, `share` (of each head, that rotates) and `original` (context before scaling) are the family's
    defaults; `partial`: the family rotates a part of each head where `partial_rotary_factor` says so;
    `aliases`: its own names of kinds; `mrope`: how it turns by time, row and column, if it does.
    Raises UnsupportedModelError for kinds and keys that are not implemented.
    """
    given = fields.table("rope_scaling") or fields.table("rope_parameters")
    outer = Fields(given, f"{fields.where}: rope_parameters")
    base = outer.positive("rope_theta", fields.positive("rope_theta", theta))
    share = outer.number("partial_rotary_factor", fields.number("partial_rotary_factor", share))
    if share != 1.0 and not (partial and 0 < share < 1):
        expected = "a share of each head up to 1.0" if partial else "1.0 for this architecture"
        raise fields.unsupported("partial_rotary_factor", share, expected)
    if mrope is None:
        return rope_from(fields, given, int(head_dim * share), base, aliases=aliases, original=original)
    given = {key: value for key, value in given.items() if key not in MROPE}
    rope = rope_from(fields, given, int(head_dim * share), base, aliases={"mrope": "default"})
    return replace(rope, **_mrope(outer, rope.dim, mrope))


def _mrope(values: Fields, dim: int, family: Mrope) -> dict[str, Any]:
    sections = values.items("mrope_section", list(family.section))
    if (
        len(sections) != 3
        or not all(type(n) is int and n >= 0 for n in sections)
        or sum(sections) != dim // 2
    ):
        raise values.unsupported("mrope_section", sections, f"three numbers that add up to {dim // 2}")
    if (given := values.flag("mrope_interleaved", family.interleaved)) != family.interleaved:
        raise values.unsupported("mrope_interleaved", given, f"{family.interleaved} for this architecture")
    return {"mrope_section": tuple(sections), "mrope_interleaved": given}


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
    kind = ROPE_KINDS.get((aliases or {}).get(named, named)) if isinstance(named, str) else None
    if kind is None:
        raise fields.unsupported("rope_type", named, ", ".join(ROPE_KINDS))
    if dim < 4 or dim % 2:
        raise fields.unsupported(
            "head_dim", dim, "an even number from 4 on of rotating elements of each head"
        )
    if kind == "yarn" and theta <= 1:
        raise fields.damaged("rope_theta", theta, "above 1 for yarn")
    said = {key: value for key, value in given.items() if value is not None and key not in COMMON}
    for key in sorted(said.keys() - KEYS[kind]):
        raise _misplaced(fields, key, said[key], kind)
    values = Fields(said, f"{fields.where}: rope_parameters")
    if kind == "proportional":
        share = Fields(given, values.where).positive("partial_rotary_factor", 1.0)
        factor = values.positive("factor", 1.0)
        return RopeConfig(dim=dim, kind=kind, theta=theta, factor=factor, turning_share=min(share, 1.0))
    return RopeConfig(dim=dim, kind=kind, theta=theta, **_settings(fields, values, kind, dim, original))


def _misplaced(fields: Fields, key: str, value: Any, kind: str) -> UnsupportedModelError:
    if kind == "default" and any(key in keys for keys in KEYS.values()):
        kinds = ", ".join(name for name, keys in KEYS.items() if key in keys)
        return UnsupportedModelError(
            f"{fields.where}: {key} in rope_parameters needs a rope_type other than 'default': "
            f"name one of {kinds}"
        )
    allowed = ", ".join(sorted(KEYS[kind])) or "no further key"
    return fields.unsupported(f"{key} in rope_parameters", value, f"{allowed} for {kind!r}")


def _settings(fields: Fields, values: Fields, kind: str, dim: int, original: int | None) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": values.positive("factor")}
    longest = fields.size("max_position_embeddings", 2048)
    if kind == "dynamic":
        return {"factor": values.positive("factor"), "original_max_position": longest}
    original = fields.size(LENGTH, original or values.size(LENGTH, longest), least=2)
    if kind == "llama3":
        return {"original_max_position": original} | _llama3(values)
    factor = values.positive("factor", longest / original)
    special = _yarn(values, factor) if kind == "yarn" else _longrope(values, factor, original, dim)
    return {"original_max_position": original, "factor": factor} | special


def _llama3(values: Fields) -> dict[str, Any]:
    made = {name: values.positive(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    if made["low_freq_factor"] >= made["high_freq_factor"]:
        expected = f"below high_freq_factor={made['high_freq_factor']}"
        raise values.damaged("low_freq_factor", made["low_freq_factor"], expected)
    return made


def _yarn(values: Fields, factor: float) -> dict[str, Any]:
    return {
        "attention_factor": values.positive("attention_factor", _yarn_temperature(values, factor)),
        "beta_fast": values.positive("beta_fast", 32.0),
        "beta_slow": values.positive("beta_slow", 1.0),
        "truncate": values.flag("truncate", True),
    }


def _yarn_temperature(values: Fields, factor: float) -> float:
    """YaRN's recommended temperature, or DeepSeek's quotient of two."""
    scale, scale_all = (0.0 if values.get(name) in (None, 0) else values.positive(name) for name in MSCALES)
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
        each = Fields({str(i): value for i, value in enumerate(factors)}, f"{values.where}: {name}")
        made[name] = tuple(map(each.positive, each.raw))
    temperature = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return made | {"attention_factor": values.positive("attention_factor", temperature)}
