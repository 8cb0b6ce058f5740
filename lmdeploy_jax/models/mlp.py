"""The gated feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.models.config import MlpConfig
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.norm import RMSNorm
from lmdeploy_jax.models.products import ACTIVATIONS
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self, hidden: int, config: MlpConfig, *, added_plainly: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        inner, activation = config.width, ACTIVATIONS[config.activation]
        rest: dict[str, Any] = {"bias": config.bias, "dtype": dtype, "kernels": kernels}
        self.gate_up = ColumnParallelLinear(
            (2, inner), (hidden,), (None, "mlp", "embed"), activation=activation, **rest
        )
        self.down = RowParallelLinear((hidden,), (inner,), ("embed", "mlp"), added_up=added_plainly, **rest)

    def __call__(
        self, x: Float[Array, "T E"], delta: Float[Array, "*S T E"] | None, norm: RMSNorm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "*parts T E"]]:
        """`Kernels.add_norm` of the arguments, and the MLP -> x, what is added to it next."""
        x, inner = self.gate_up(x, delta, norm)
        return x, self.down(inner)
