"""The gated feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec

from lmdeploy_jax.models.config import MlpConfig
from lmdeploy_jax.models.kernels import SECOND, WHOLE, Activation, Kernels
from lmdeploy_jax.models.linear import Linear, few_rows, product, turned_product
from lmdeploy_jax.models.norm import RMSNorm

ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(
        self, hidden: int, config: MlpConfig, *, added_plainly: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        inner, bias = config.width, config.bias
        self.activation = config.activation
        self.kernels = kernels
        self.added_plainly = added_plainly and not bias
        self.gate_up = Linear((2, inner), (hidden,), (None, "mlp", "embed"), bias=bias, dtype=dtype)
        self.down = Linear((hidden,), (inner,), ("embed", "mlp"), bias=bias, dtype=dtype)

    def __call__(self, x: Array, delta: Array | None, norm: RMSNorm | None) -> tuple[Array, Array]:
        """`Kernels.add_norm` of the arguments, and the MLP -> x, [T, E] (or parts of it)."""
        activation = ACTIVATION_FUNCTIONS[self.activation]
        done = self.kernels.norm_gated_product(self.gate_up, x, delta, norm, activation)
        if done is None:
            x, normed = self.kernels.add_norm(x, delta, norm)
            inner = self.kernels.gated_product(self.gate_up, normed, activation)
            if inner is None:
                return x, self._plain(normed, activation)
            done = x, inner
        x, inner = done
        return x, self._down(inner)

    def _plain(self, x: Array, activation: Activation) -> Array:
        if self.kernels.tp > 1 or self.gate_up.bias is not None or self.down.bias is not None:
            return self._rows(x, activation)
        rows, columns = (
            partial(self._rows, activation=activation),
            partial(self._columns, activation=activation),
        )
        return lax.platform_dependent(x, cpu=columns, default=rows) if few_rows(x) else rows(x)

    def _rows(self, x: Array, activation: Activation) -> Array:
        gate_up = self._gate_up(x)  # [T, 2, I]
        return self._down(activation(gate_up[:, 0]) * gate_up[:, 1])

    def _columns(self, x: Array, activation: Activation) -> Array:
        """The same in the order of a CPU's products of few rows, with nothing turned in between."""
        weight = self.gate_up.weight[...]
        gate, up = jnp.split(turned_product(x.T, weight.reshape(-1, weight.shape[2])), 2)  # [I, T]
        return turned_product(activation(gate) * up, self.down.weight[...]).T

    def _down(self, inner: Array) -> Array:
        return self.kernels.product(self.down, inner) if self.added_plainly else self.down(inner)

    def _gate_up(self, x: Array) -> Array:
        if self.kernels.tp == 1:
            return self.gate_up(x)
        # Each device multiplies with its own rows of both; in one matrix of all, those are not one block.
        weight, bias = self.gate_up.weight[...], self.gate_up.bias
        args = (x, weight) if bias is None else (x, weight, bias[...])
        return jax.shard_map(
            product,
            mesh=self.kernels.mesh,
            in_specs=(WHOLE, SECOND, SECOND)[: len(args)],
            out_specs=PartitionSpec(None, None, "tp"),
            check_vma=False,
        )(*args)
