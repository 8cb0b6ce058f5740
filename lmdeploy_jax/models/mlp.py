"""Feed-forward blocks, gated (Shazeer, 2020) and not."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.config import MlpConfig
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import param
from lmdeploy_jax.models.norm import Norm
from lmdeploy_jax.models.products import ACTIVATIONS, Activation
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear
from lmdeploy_jax.models.residual import Delta, NextDelta


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self, hidden: int, config: MlpConfig, *, added_plainly: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        inner, activation = config.width, _activation(config.activation, config.gate_multiplier)
        self.output_multiplier = config.output_multiplier
        rest: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "kernels": kernels}
        self.gate_up = ColumnParallelLinear(
            (2, inner), (hidden,), (None, "mlp", "embed"), activation=activation, **rest
        )
        self.down = RowParallelLinear((hidden,), (inner,), ("embed", "mlp"), added_up=added_plainly, **rest)

    def __call__(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], NextDelta]:
        """`Kernels.add_norm` of the arguments, and the MLP -> x, what is added to it next."""
        if self.output_multiplier == 1.0:
            x, rows = self.gate_up.rounded(x, delta, norm, self.down)
            return x, self.down(rows)
        x, inner = self.gate_up(x, delta, norm)
        return x, self.down(inner * self.output_multiplier)


class PlainMLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self, hidden: int, config: MlpConfig, *, added_plainly: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        rest: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "kernels": kernels}
        self.up = ColumnParallelLinear((config.width,), (hidden,), ("mlp", "embed"), **rest)
        self.down = RowParallelLinear(
            (hidden,), (config.width,), ("embed", "mlp"), added_up=added_plainly, **rest
        )
        self.activation = XIELU() if config.activation == "xielu" else ACTIVATIONS[config.activation]

    def __call__(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], NextDelta]:
        """As `GatedMLP.__call__`."""
        x, inner = self.up(x, delta, norm)
        inner = (inner.sum(0) if inner.ndim == 3 else inner).astype(x.dtype)
        inner = inner if self.up.bias is None else inner + self.up.bias[...]
        return x, self.down(self.activation(inner))


class XIELU(nnx.Module):
    """Quadratic above 0 and exponential below, by learnt numbers (Huang and Schlag, 2024)."""

    def __init__(self) -> None:
        def number() -> nnx.Param:
            return param((1,), jnp.dtype("float32"), (None,))

        self.alpha_p, self.alpha_n, self.beta, self.eps = number(), number(), number(), number()

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T I"]:
        wide, beta = x.astype(jnp.float32), self.beta[...]
        above = jax.nn.softplus(self.alpha_p[...]) * wide * wide
        below = beta + jax.nn.softplus(self.alpha_n[...])
        below = below * (jnp.expm1(jnp.minimum(wide, self.eps[...])) - wide)
        return (jnp.where(wide > 0, above, below) + beta * wide).astype(x.dtype)


def feed_forward(hidden: int, config: MlpConfig, **how: Any) -> GatedMLP | PlainMLP:
    """The block that `config` describes."""
    return (GatedMLP if config.gated else PlainMLP)(hidden, config, **how)


@cache  # layers alike must have the same function, so that they are traced once
def _activation(name: str, multiplier: float) -> Activation:
    plain = ACTIVATIONS[name]
    return plain if multiplier == 1.0 else lambda gate: plain(gate * multiplier)
