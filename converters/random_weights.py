"""Weights that no file holds: random numbers, made where they lie, for measurements of speed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

FILE = "random_weights.json"
LARGEST = 0.03


def declare(folder: Path, dtype: str) -> None:
    """Let a folder with a config stand for a checkpoint of such weights."""
    (folder / FILE).write_text(json.dumps({"dtype": dtype}) + "\n")


def are_random(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `declare` has made."""
    return (Path(folder) / FILE).is_file()


def stored_dtype(folder: str | os.PathLike[str]) -> jnp.dtype:
    """That of the weights as they were declared."""
    return jnp.dtype(json.loads((Path(folder) / FILE).read_text())["dtype"])


def draw(specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """An array for each name, on the devices of its sharding."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(specs))
    drawn = {}
    for key, (name, spec) in zip(keys, specs.items(), strict=True):
        drawn[name] = _maker(spec.shape, spec.dtype, spec.sharding)(key)
    return drawn


@cache  # weights of layers alike are made by one program
def _maker(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding) -> Callable[..., jax.Array]:
    def uniform(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -LARGEST, LARGEST)

    return jax.jit(uniform, out_shardings=sharding)
