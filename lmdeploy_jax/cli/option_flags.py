"""Flags of a dataclass of options: one for each field, whose help stands in the field's metadata."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from absl import flags as absl_flags

from lmdeploy_jax.cli.flags import FlagSet, define_list


def add_option_flags(flags: FlagSet, section: str, options: type) -> None:
    """Define them."""
    hints = get_type_hints(options)
    for field in fields(options):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        flags.add(section, _definition(hints[field.name]), field.name, default, field.metadata["help"])


def _definition(hint: Any) -> Any:
    """absl's DEFINE function for an option's type."""
    if get_origin(hint) is Literal:
        return partial(absl_flags.DEFINE_enum, enum_values=list(get_args(hint)))
    kinds = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float}
    for kind, define_flag in kinds.items():
        if hint in (kind, kind | None):
            return define_flag
    return absl_flags.DEFINE_string if hint in (str, str | None) else define_list
