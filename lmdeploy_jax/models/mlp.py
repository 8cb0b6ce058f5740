"""The gated feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.linear import Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        self.activation = config.activation
        self.gate_up = Linear(
            "te,nie->tni",
            (2, inner, hidden),
            (None, "mlp", "embed"),
            dtype=dtype,
            bias_dims=(0, 1) if config.mlp_bias else (),
        )
        self.down = Linear(
            "ti,ei->te",
            (hidden, inner),
            ("embed", "mlp"),
            dtype=dtype,
            bias_dims=(0,) if config.mlp_bias else (),
        )

    def __call__(self, x: Array) -> Array:
        gate_up = self.gate_up(x)  # [T, 2, I]
        return self.down(ACTIVATION_FUNCTIONS[self.activation](gate_up[:, 0]) * gate_up[:, 1])
