"""Array shapes stand in annotations, and every call that a test makes checks them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import get_type_hints

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from lmdeploy_jax import models, pallas_kernels
from lmdeploy_jax.pallas_kernels.norm.xla import rms_norm
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.pallas_kernels.streaming import attend_paged

WITHOUT_SHAPES = {
    "lmdeploy_jax.pallas_kernels.options",  # its checks take what does not fit, and say so
    "lmdeploy_jax.pallas_kernels.launch",  # any arrays of any kernel
}


def modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(info.name)


def functions(module: ModuleType) -> Iterator[Callable[..., object]]:
    """Public functions that a module defines, and public methods of its public classes."""
    for owner in (module, *vars(module).values()):
        own = inspect.isclass(owner) and owner.__module__ == module.__name__ and is_public(owner.__name__)
        if owner is module or own:
            for name, member in vars(owner).items():
                if inspect.isfunction(member) and member.__module__ == module.__name__ and is_public(name):
                    yield member


def is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith("_")


@pytest.mark.parametrize("package", [pallas_kernels, models], ids=lambda package: package.__name__)
def test_public_functions_say_the_shapes_of_their_arrays(package: ModuleType) -> None:
    bare = set()
    for module in modules(package):
        for function in functions(module) if module.__name__ not in WITHOUT_SHAPES else ():
            get_type_hints(function)  # a name that is not there would leave its argument unchecked
            for name, annotation in function.__annotations__.items():
                rest = re.sub(r"Callable\[.*\]|\b[A-Z]\w+\[Array, '[^']*'\]", "", annotation)
                if re.search(r"\bArray\b", rest):
                    bare.add(f"{module.__name__}.{function.__qualname__}: {name}")
    assert not bare, sorted(bare)


def test_a_shape_that_is_not_the_annotations_is_an_error() -> None:
    cache, q = jnp.zeros((3, 2, 64, 16)), jnp.zeros((1, 2, 4, 16))
    table, plain = jnp.zeros((1, 2), jnp.int32), AttentionOptions(1.0)
    attend_paged(q, cache, cache, table, jnp.zeros((1, 4), jnp.int32), None, plain, group=1)
    with pytest.raises(TypeCheckError, match="parameter 'positions'"):
        attend_paged(q, cache, cache, table, jnp.zeros((1, 5), jnp.int32), None, plain, group=1)
    with pytest.raises(TypeCheckError, match="parameter 'tables'"):
        attend_paged(q, cache, cache, table / 2, jnp.zeros((1, 4), jnp.int32), None, plain, group=1)


def test_axes_of_one_name_have_one_size_in_a_call() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'weight'"):
        rms_norm(jnp.zeros((5, 1)), jnp.zeros(8), eps=1e-6)  # would broadcast without a word
