"""Weights that no file holds: random numbers, made where they lie, for measurements of speed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from lmdeploy_jax.models.formats import FOUR_BITS, WeightFormat

FILE = "random_weights.json"
LARGEST = 0.03


QUANTISED = r"layers\.\d+\.(attention\.(qkv|o)|mlp\.(gate_up|down))\.weight"
BYTES_STD, NIBBLES_STD = 32.0, 4.6  # of what is drawn for elements of 8 bits, and of words of 4


def declare(folder: Path, dtype: str, held: Mapping[int, WeightFormat] = MappingProxyType({})) -> None:
    """Let a folder with a config stand for a checkpoint of such weights. held: how those of linear layers are
    quantised, by their columns.
    """
    formats = {columns: asdict(form) for columns, form in held.items()}
    (folder / FILE).write_text(json.dumps({"dtype": dtype, "held": formats}) + "\n")


def are_random(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `declare` has made."""
    return (Path(folder) / FILE).is_file()


def stored_dtype(folder: str | os.PathLike[str]) -> jnp.dtype:
    """That of the weights as they were declared."""
    return jnp.dtype(json.loads((Path(folder) / FILE).read_text())["dtype"])


def formats(
    folder: str | os.PathLike[str], specs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, WeightFormat]:
    """How each of the weights named in `specs` that was declared to be quantised is held."""
    held = json.loads((Path(folder) / FILE).read_text()).get("held", {})
    found = {}
    for name, spec in specs.items():
        if held and re.fullmatch(QUANTISED, name):
            columns = math.prod(spec.shape[1:]) if name.endswith(".o.weight") else spec.shape[-1]
            found[name] = WeightFormat(**held[str(columns)])
    return found


def draw(
    specs: Mapping[str, jax.ShapeDtypeStruct], held: Mapping[str, WeightFormat] = MappingProxyType({})
) -> dict[str, jax.Array]:
    """An array for each name, on the devices of its sharding; `held`: the weights that are quantised."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(specs))
    scales = {f"{name}.scales": _scale(form) for name, form in held.items()}
    drawn = {}
    for key, (name, spec) in zip(keys, specs.items(), strict=True):
        drawn[name] = _maker(spec.shape, spec.dtype, spec.sharding, scales.get(name))(key)
    return drawn


def _scale(form: WeightFormat) -> float:
    """By which elements become as large as plain weights."""
    return LARGEST / 3**0.5 / (NIBBLES_STD if form.element in FOUR_BITS else BYTES_STD)


@cache  # weights of layers alike are made by one program
def _maker(
    shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding, scale: float | None
) -> Callable[..., jax.Array]:
    def make(key: jax.Array) -> jax.Array:
        if scale is not None:
            return jnp.full(shape, scale, dtype)
        if dtype == jnp.uint16:
            return jax.random.bits(key, shape, jnp.uint16)
        if dtype == jnp.uint8:  # zero points
            return jax.random.randint(key, shape, 7, 9, jnp.uint8)
        if jnp.dtype(dtype).itemsize == 1:
            return jnp.clip(BYTES_STD * jax.random.normal(key, shape, jnp.bfloat16), -127, 127).astype(dtype)
        return jax.random.uniform(key, shape, dtype, -LARGEST, LARGEST)

    return jax.jit(make, out_shardings=sharding)
