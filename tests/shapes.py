"""Checks the shapes in annotations at every call, by an import hook that `tests/conftest.py` installs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook
from typing_extensions import is_protocol

MODULES = ["lmdeploy_jax.pallas_kernels", "lmdeploy_jax.models"]
F = TypeVar("F", bound=Callable[..., object])


def install() -> None:
    """For modules that are imported from now on."""
    install_import_hook(MODULES, f"{__name__}.checked")


def checked(function: F) -> F:
    """Leaves out constructors, since a `tree_map` makes dataclasses that are pytrees of anything, and
    protocols, which mypy checks.
    """
    if function.__name__ == "__init__":
        return function
    hints = function.__annotations__
    hints |= {name: object for name, hint in hints.items() if isinstance(hint, type) and is_protocol(hint)}
    with warnings.catch_warnings(action="ignore", category=BeartypeDecorHintPep585DeprecationWarning):
        return beartype(function)  # the warning is about flax's own `nnx.State`
