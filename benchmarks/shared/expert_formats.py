"""Random experts' weights in the formats of quantised checkpoints, as their kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmdeploy_jax.pallas_kernels.grouped_matmul.tile import Tuning
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD
from lmdeploy_jax.pallas_kernels.shapes import Quantised

STD = 0.02  # of weights
EXPONENT = 120  # of E8M0: with E2M1's numbers, about that deviation


@dataclass(frozen=True)
class Format:
    """group: columns that share a scale; None: all. zeros: whether each has a zero point too."""

    values: str
    scales: str
    group: int | None
    zeros: bool = False

    def weight(self, key: jax.Array, *shape: int) -> Quantised:
        """[X, *out, K]."""
        *out, columns = shape
        drawn, scaled, zeroed = jax.random.split(key, 3)
        grouped = (1 if self.group is None else columns // self.group, *out)
        zeros = jax.random.randint(zeroed, grouped, 6, 11).astype("uint8") if self.zeros else None
        return Quantised(self._values(drawn, *out, columns), self._scales(scaled, grouped), zeros)

    def _values(self, key: jax.Array, *shape: int) -> jax.Array:
        *out, columns = shape
        if self.values == "uint16":
            return jax.random.bits(key, (*out, columns // PER_WORD), "uint16")
        return (jax.random.normal(key, shape, "bfloat16") * 100).astype(self.values)

    def _scales(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if self.scales == "uint8":
            return jax.random.randint(key, shape, EXPONENT - 2, EXPONENT + 2).astype("uint8")
        size = STD / (5 if self.values == "uint16" else 100)
        return (jax.random.uniform(key, shape, minval=0.5, maxval=1.5) * size).astype(self.scales)


FORMATS = {
    "bf16": None,
    "awq": Format("uint16", "float16", 128, zeros=True),
    "int4-g128": Format("uint16", "bfloat16", 128),
    "int4-g32": Format("uint16", "bfloat16", 32),
    "mxfp4": Format("uint16", "uint8", 32),
    "fp8": Format("float8_e4m3fn", "float32", None),
    "fp8-blocks": Format("float8_e4m3fn", "float32", 128),
}
WORDS, BYTES = True, False
CUTS = {  # of few tokens and of many, by what an element lies in
    (WORDS, True): [(32, 256, 4, 3), (32, 512, 2, 3), (32, 128, 2, 4), (64, 256, 4, 3), (64, 256, 2, 3)],
    (BYTES, True): [(32, 128, 2, 4), (32, 128, 4, 4), (64, 128, 4, 3), (16, 128, 2, 4), (32, 64, 2, 6)],
    (WORDS, False): [(64, 128, 4, 3), (128, 128, 8, 3), (128, 128, 4, 3)],
    (BYTES, False): [(64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 8, 4)],
}


def draw(form: Format | None, key: jax.Array, *shape: int) -> Any:
    """A weight [X, *out, K], plain without a format."""
    if form is None:
        return jax.random.normal(key, shape, "bfloat16") * STD
    return jax.jit(form.weight, static_argnums=range(1, len(shape) + 1))(key, *shape)


def bytes_of(weight: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(weight))


def cuts(weight: Any, *, few: bool) -> list[Tuning]:
    """Other cuts of a quantised weight's kernels."""
    return [Tuning(*cut) for cut in CUTS[weight.values.dtype == jnp.uint16, few]]
