"""Tower and projector: what turns patches into rows that stand in the place of token embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.products import dense_product
from lmdeploy_jax.vision.config import (
    ActivationConfig,
    GatedConfig,
    LearnedRows,
    LinearConfig,
    MergeConfig,
    NormConfig,
    PoolConfig,
    StandardConfig,
    Step,
    VisionModelConfig,
)
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.layers import ACTIVATIONS, Dense, GatedMLP, make_norm
from lmdeploy_jax.vision.tower import Tower


class Merge(nnx.Module):
    """Patches are listed block by block, so that their features side by side are a reshape."""

    def __init__(self, config: MergeConfig) -> None:
        self.count = config.count
        self.channels_first = config.channels_first

    def __call__(self, x: Array) -> Array:
        """x [T, E] -> [T / count, count * E]."""
        blocks = x.reshape(-1, self.count, x.shape[-1])
        return (blocks.swapaxes(1, 2) if self.channels_first else blocks).reshape(len(blocks), -1)


class Pool(nnx.Module):
    """The mean of the patches of a block."""

    def __init__(self, config: PoolConfig) -> None:
        self.count = config.count

    def __call__(self, x: Array) -> Array:
        """x [T, E] -> [T / count, E]."""
        blocks = x.reshape(-1, self.count, x.shape[-1])
        return blocks.mean(axis=1, dtype=jnp.float32).astype(x.dtype)


class Standardise(nnx.Module):
    """See `StandardConfig`; in float32, since large numbers cancel."""

    def __init__(self, config: StandardConfig, *, dtype: jnp.dtype) -> None:
        self.factor = config.factor
        self.bias = param((config.width,), dtype, (None,))
        self.scale = param((config.width,), dtype, (None,))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32) * self.factor - self.bias[...].astype(jnp.float32)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Product(nnx.Module):
    """A product as a step."""

    def __init__(self, config: LinearConfig, *, dtype: jnp.dtype) -> None:
        self.config = config
        if config.transposed:
            self.weight = param((*config.inner, config.out), dtype, (None, None))
        else:
            self.linear = Dense((config.out,), config.inner, bias=config.bias, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        """x [T, inner] -> [T, out]."""
        if self.config.transposed:
            return dense_product(x, self.weight[...].T)
        return self.linear(x.reshape(len(x), *self.config.inner))


class Activate(nnx.Module):
    """An activation function as a step."""

    def __init__(self, config: ActivationConfig) -> None:
        self.name = config.name

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.name](x)


class Learned(nnx.Module):
    """Learned rows after those that come in."""

    def __init__(self, config: LearnedRows, *, dtype: jnp.dtype) -> None:
        self.rows = param(config.shape, dtype, (None,) * len(config.shape))

    def __call__(self, x: Array) -> Array:
        """x [T, E] -> [T + count, E]."""
        return jnp.concatenate([x, self.rows[...].reshape(-1, x.shape[-1]).astype(x.dtype)])


def _step(step: Step, dtype: jnp.dtype) -> nnx.Module:
    match step:
        case MergeConfig():
            return Merge(step)
        case PoolConfig():
            return Pool(step)
        case StandardConfig():
            return Standardise(step, dtype=dtype)
        case NormConfig():
            return make_norm(step, dtype=dtype)
        case LinearConfig():
            return Product(step, dtype=dtype)
        case ActivationConfig():
            return Activate(step)
        case GatedConfig():
            return GatedMLP(step.inner, step.width, step.out, step.activation, bias=False, dtype=dtype)
        case LearnedRows():
            return Learned(step, dtype=dtype)


class Projector(nnx.Module):
    """Features of patches -> rows of the language model's width."""

    def __init__(self, steps: tuple[Step, ...], *, dtype: jnp.dtype) -> None:
        self.steps = nnx.List(_step(step, dtype) for step in steps)

    def __call__(self, x: Array) -> Array:
        """x [B, N, E] -> [rows, D]."""
        x = x.reshape(-1, x.shape[-1])
        for step in self.steps:
            x = step(x)
        return x


class VisionModel(nnx.Module):
    """Build it under `nnx.eval_shape` and fill the leaves from a checkpoint. `backend`: of attention."""

    def __init__(self, config: VisionModelConfig, *, dtype: jnp.dtype, backend: str = "xla") -> None:
        self.tower = Tower(config.tower, config.processor, dtype=dtype, backend=backend)
        self.projector = Projector(config.projector, dtype=dtype)
        self.deepstack = nnx.List(Projector(config.deepstack, dtype=dtype) for _ in config.tower.deepstack)

    def __call__(self, inputs: VisionInputs) -> Array:
        """-> [1 + k, M, D]: the rows that `inputs.output` names, then the same of each of k DeepStack
        layers.
        """
        features, taken = self.tower(inputs)
        rows = [self.projector(features), *(each(x) for each, x in zip(self.deepstack, taken, strict=True))]
        return jnp.stack([each[inputs.output] for each in rows])
