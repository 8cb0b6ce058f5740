"""Checks the shapes in annotations at every call, by an import hook that `tests/conftest.py` installs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from jaxtyping import install_import_hook

MODULES = ["lmdeploy_jax.pallas_kernels", "lmdeploy_jax.models"]
F = TypeVar("F", bound=Callable[..., object])


def install() -> None:
    """For modules that are imported from now on."""
    install_import_hook(MODULES, f"{__name__}.checked")


def checked(function: F) -> F:
    """Constructors are left out: JAX builds dataclasses that are pytrees with whatever a tree_map gives."""
    return function if function.__name__ == "__init__" else beartype(function)
