"""The sums of a streamed product's tile (`mosaic.py`): what is done between the products of its blocks.

A warpgroup waits for a block, multiplies with it, and says when its memory is free. A block of 4 bits has to
be unpacked before and a group's sum scaled behind, either with nothing in between or while tensor cores are
at another block. Registers that tensor cores read or write may not be touched meanwhile: two blocks in turn
have their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, Shaped

from lmdeploy_jax.pallas_kernels.quant_gemm.nibbles import LAYOUT, unpacked
from lmdeploy_jax.pallas_kernels.quant_gemm.streaming import BLOCK_OUT

COMPUTE = 2  # warpgroups
ROWS = BLOCK_OUT // COMPUTE  # outputs of each
BY_OUTPUT, BY_TOKEN = LAYOUT.reduce(1), LAYOUT.reduce(0)
Count = Int32[Array, ""]
Total = Shaped[Array, "outputs tokens"]  # f32, or i32 of INT8
State = tuple[jax.Array, ...]
Shared = Any  # a Ref of shared memory; in the interpreter of JAX 0.12 one with transforms, of another type


@dataclass(frozen=True)
class Stages:
    """Blocks in shared memory as the warpgroup `group` sees them, by their number in this program.

    vectors: beside each block, the scales of its outputs and those of its tokens, or zeros; empty where the
    whole sums are scaled. per_tile, in_all: how many blocks a tile has, and all of the program's tiles.
    """

    x: Shared
    weight: Shared
    vectors: list[Shared]
    full: jax.Ref
    empty: jax.Ref
    group: jax.Array
    per_tile: int
    in_all: jax.Array

    @property
    def words(self) -> bool:
        return self.weight.dtype == jnp.uint16

    @property
    def mine(self) -> Any:
        """This warpgroup's outputs of a tile."""
        return pl.ds(self.group * ROWS, ROWS)

    @property
    def sums(self) -> Any:
        """The dtype of what tensor cores add up."""
        return jnp.int32 if self.x.dtype == jnp.int8 else jnp.float32

    def zeros(self) -> Shaped[Array, "outputs tokens"]:
        return plgpu.layout_cast(jnp.zeros((ROWS, self.x.shape[1]), self.sums), LAYOUT)

    def products(self, function: Callable[..., Any], parts: int = 1) -> Any:
        """What `function` gives of so many accumulators, which are zeros at first."""
        return pl.run_scoped(function, *[plgpu.ACC((ROWS, self.x.shape[1]), self.sums)] * parts)

    def wait(self, count: Count) -> None:
        plgpu.barrier_wait(self.full.at[self._at(count)])

    def free(self, count: Count) -> None:
        plgpu.barrier_arrive(self.empty.at[self._at(count)])

    def left(self, count: Count) -> Shared | Shaped[Array, "outputs columns"]:
        """The block's weight as it is or, of 4 bits, in registers."""
        block = self.weight.at[self._at(count), self.mine]
        if not self.words:
            return block
        words = load(block, LAYOUT)
        if len(self.vectors) == 1:
            return unpacked(words, None)
        return unpacked(words, load(self.vectors[1].at[self._at(count), self.mine], BY_OUTPUT))

    def multiply(self, part: Any, left: Any, count: Count) -> None:
        plgpu.wgmma(part, left, self.x.at[self._at(count)].T)

    def scaled(self, part: Shaped[Array, "outputs tokens"], count: Count) -> Total:
        """A block's product times its scales, behind which its memory is free."""
        outputs = load(self.vectors[0].at[self._at(count), self.mine], BY_OUTPUT).astype(jnp.float32)
        part = part * lax.broadcast_in_dim(outputs, part.shape, [0])
        if not self.words:
            tokens = load(self.vectors[1].at[self._at(count), pl.ds(0, part.shape[1])], BY_TOKEN)
            part = part * lax.broadcast_in_dim(tokens, part.shape, [1])
        self.free(count)
        return part

    def _at(self, count: Count) -> jax.Array:
        return lax.rem(count, self.x.shape[0])


class InTurn:
    """Each block is unpacked, multiplied and scaled before the next one; `at_once`: blocks of a step."""

    def __init__(self, stages: Stages, at_once: int) -> None:
        self.stages, self.each = stages, gcd(stages.per_tile, at_once)

    def first(self) -> State:
        """The state that the first tile is given."""
        return ()

    def tile(self, first: Count, state: State) -> tuple[Total, State]:
        """The sums of the tile whose first block has the number `first`, and the state for the next one."""

        def step(index: jax.Array, total: jax.Array) -> jax.Array:
            return self._add(first + index * self.each, total)

        steps = self.stages.per_tile // self.each
        return lax.fori_loop(0, steps, step, self.stages.zeros()), state

    def _add(self, first: Count, total: jax.Array) -> jax.Array:
        """With the blocks of a step, from number `first` on."""
        stages = self.stages
        stages.wait(first)
        left = stages.left(first)

        def product(part: Any) -> jax.Array:
            stages.multiply(part, left, first)
            plgpu.wgmma_wait(0)
            return part[...]

        return total + stages.scaled(stages.products(product), first)


class Scaled(InTurn):
    """Blocks of 8 bits, each scaled while tensor cores are at those behind it in the step."""

    def _add(self, first: Count, total: jax.Array) -> jax.Array:
        stages = self.stages

        def products(*parts: Any) -> jax.Array:
            out = total
            for number, part in enumerate(parts):
                stages.wait(first + number)
                stages.multiply(part, stages.left(first + number), first + number)
            for number, part in enumerate(parts):
                plgpu.wgmma_wait(self.each - 1 - number)
                found = plgpu.wgmma_accumulator_load(part, wait_n=None)
                out = out + stages.scaled(found, first + number)
            return out

        return stages.products(products, self.each)


class Whole(InTurn):
    """Blocks of 8 bits that tensor cores add up, whose sums are scaled by who asks for them."""

    def _add(self, first: Count, total: jax.Array) -> jax.Array:
        stages = self.stages

        def products(part: Any) -> jax.Array:
            for number in range(self.each):
                count = first + number
                stages.wait(count)
                stages.multiply(part, stages.left(count), count)
                if number:
                    plgpu.wgmma_wait(1)  # the product before is done
                    stages.free(count - 1)
            plgpu.wgmma_wait(0)
            stages.free(first + self.each - 1)
            return part[...]

        return total + stages.products(products)


class Unpacked(InTurn):
    """Blocks of 4 bits, each unpacked while tensor cores multiply the one before: that is the state."""

    def first(self) -> State:
        return (self._next(jnp.int32(0)),)

    def tile(self, first: Count, state: State) -> tuple[Total, State]:
        def step(index: jax.Array, carried: State) -> State:
            for number in range(self.each):
                carried = self._step(first + index * self.each + number, *carried)
            return carried

        steps = self.stages.per_tile // self.each
        total, held = lax.fori_loop(0, steps, step, (self.stages.zeros(), *state))
        return total, (held,)

    def _step(self, count: Count, total: Total, held: jax.Array) -> State:
        stages = self.stages

        def product(part: Any) -> State:
            stages.multiply(part, held, count)
            following = self._next(count + 1)
            plgpu.wgmma_wait(0)
            return part[...], following

        part, following = stages.products(product)
        return total + stages.scaled(part, count), following

    def _next(self, count: Count) -> jax.Array:
        """The left operand of a block once that is there; behind the last one, anything."""
        pl.when(count < self.stages.in_all)(lambda: self.stages.wait(count))
        left = self.stages.left(count)
        assert isinstance(left, jax.Array)  # of 4 bits
        return left


def load(ref: Any, layout: Any) -> Shaped[Array, "..."]:
    return plgpu.layout_cast(ref[...], layout)
