"""A mixture of experts in the place of a layer's MLP."""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int32

from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig, MlpConfig
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.mlp import GatedMLP, feed_forward
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.products import ACTIVATIONS, dense_product
from lmdeploy_jax.models.quantised import QuantWeight
from lmdeploy_jax.models.residual import Delta, NextDelta, SumOverDevices, summed
from lmdeploy_jax.models.routing import Router, Routes
from lmdeploy_jax.pallas_kernels.grouped_matmul import (
    Gating,
    RowGroups,
    fused_experts,
    gated_grouped_matmul,
    group_rows,
    grouped_matmul,
    grouped_matmul_of,
    weighted_grouped_matmul,
    why_not_fused,
)
from lmdeploy_jax.pallas_kernels.shapes import Quantised

SWIGLU_ALPHA = 1.702
STREAMED_ACTIVATIONS = ("silu",)  # those that were compiled for Mosaic
EXACT_PARTS = 256  # tokens up to which an expert's output is not rounded: of more, memory's time counts


class ExpertLinear(Linear):
    """The weights [X, *out, *inner] of all experts; a row is multiplied with that of its own."""

    def __call__(
        self, rows: Float[Array, "M K"], groups: RowGroups, *, out_dtype: DTypeLike
    ) -> Float[Array, "M *out"]:
        """Biases belong to the callers."""
        experts, *rest, columns = self.weight.shape
        out = prod(rest)
        if isinstance(self.weight, QuantWeight):
            weight_of = partial(self._dense_expert, out)
            product = grouped_matmul_of(rows, weight_of, groups, shape=(experts, out), out_dtype=out_dtype)
        else:
            weight = self.weight.dense().reshape(experts, out, columns)
            product = grouped_matmul(rows, weight, groups, out_dtype=out_dtype)
        return product.reshape(rows.shape[0], *rest)

    def operand(self) -> Float[Array, "X *out K"] | Quantised | None:
        """What the kernels read; None: they cannot."""
        weight = self.weight
        return weight.experts() if isinstance(weight, QuantWeight) else weight.dense()

    def _dense_expert(self, out: int, expert: Array) -> Float[Array, "N K"]:
        assert isinstance(self.weight, QuantWeight)
        return self.weight.dense_at(expert).reshape(out, -1)


class Experts(nnx.Module, SumOverDevices):
    """The blocks among which a router chooses, cut over devices as an MLP is. `gate_up` [X, 2, I, E] is both
    products of a block that is gated, and [X, 1, I, E] the one of a block that is not.
    added_up: whether their sum is added to the residual stream as it is.
    """

    def __init__(
        self, hidden: int, config: MixtureConfig, *, added_up: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        count, expert = config.router.experts, config.expert
        self.added_up = added_up
        self.kernels = kernels
        self.gating = gating(expert)
        self.streamed = expert.activation in STREAMED_ACTIVATIONS
        rest: dict[str, Any] = {"bias": expert.bias, "dtype": dtype}
        inner, products = ("experts", None, "expert_mlp", "embed"), 2 if expert.gated else 1
        self.gate_up = ExpertLinear((count, products, expert.width), (hidden,), inner, **rest)
        self.down = ExpertLinear((count, hidden), (expert.width,), ("experts", "embed", "expert_mlp"), **rest)

    def __call__(
        self, x: Float[Array, "T E"], routes: Routes, beside: Float[Array, "T E"] | None = None
    ) -> NextDelta:
        """The weighted sum of each token's experts, whole or a part for each; one device adds `beside`."""
        out = self._mixed(x, self._own(routes), beside)
        if beside is None:
            return out
        whole = summed(out)
        return whole if whole.ndim == 3 else whole + beside

    def _mixed(self, x: Float[Array, "T E"], routes: Routes, beside: Float[Array, "T E"] | None) -> NextDelta:
        """`beside` is in parts alone."""
        if self.kernels.backend != "xla":
            gate_up, down = self.gate_up.operand(), self.down.operand()
            if gate_up is not None and down is not None:
                return self._by_kernels(x, routes, gate_up, down, beside)
        return self._by_xla(x, routes)

    def _own(self, routes: Routes) -> Routes:
        """By the numbers of this device's experts; others have none, and count for nothing here."""
        if self.kernels.ep == 1:
            return routes
        held = self.gate_up.weight.shape[0]
        experts = self.kernels.collectives.own_experts(routes.experts, held)
        return Routes(experts, jnp.where(experts < held, routes.weights, 0))

    def _of_own(self, out: Float[Array, "T k E"], routes: Routes) -> Float[Array, "T k E"]:
        """Without what stands where experts of other devices were chosen, which may be anything."""
        held = self.gate_up.weight.shape[0]
        return out if self.kernels.ep == 1 else jnp.where((routes.experts < held)[:, :, None], out, 0)

    def _summed(self, out: Float[Array, "*S T E"], dtype: jnp.dtype) -> NextDelta:
        left = self.left_to_norm(out, dtype) if self.added_up else None
        return self.kernels.collectives.all_reduce(out, dtype) if left is None else left

    def _fused(self, x: Float[Array, "T E"], routes: Routes) -> NextDelta:
        weights = self.gate_up.weight.dense(), self.down.weight.dense()
        out = fused_experts(x, *weights, routes.experts, routes.weights, gating=self.gating)
        return self._summed(out, x.dtype)

    def _fuses(self, x: Float[Array, "T E"], choices: int) -> bool:
        """Whether Mosaic's kernels were faster, and can do it."""
        if self.kernels.tuning.experts != "mosaic" or self.kernels.backend != "pallas" or not self.streamed:
            return False
        if self.kernels.ep > 1:  # its work list would need a place for rows that other devices multiply
            return False
        if isinstance(self.gate_up.weight, QuantWeight) or isinstance(self.down.weight, QuantWeight):
            return False
        shape, biased = self.gate_up.weight.shape, self.gate_up.bias is not None
        return why_not_fused(x.shape[0], choices, shape, x.dtype, biased=biased) is None

    def _by_kernels(
        self,
        x: Float[Array, "T E"],
        routes: Routes,
        gate_up: Array | Quantised,
        down: Array | Quantised,
        beside: Float[Array, "T E"] | None,
    ) -> NextDelta:
        """Parts, which the next norm adds: a token's choices, and the device's share of their bias."""
        if self._fuses(x, routes.experts.shape[1]):
            return self._fused(x, routes)
        backend = self.kernels.backend
        held, alone = self.gate_up.weight.shape[0], x.shape[0] == 1
        groups = group_rows(routes.experts.reshape(-1), held, different=alone, backend=backend)
        bias = None if self.gate_up.bias is None else self.gate_up.bias[...]
        inner = gated_grouped_matmul(x, gate_up, groups, gating=self.gating, bias=bias, backend=backend)
        bias = None if self.down.bias is None else self.down.bias[...]
        sharing = self.kernels.tp // self.kernels.ep  # devices that hold parts of this one's experts
        bias = bias if bias is None or sharing == 1 else bias.astype(jnp.float32) / sharing
        wide = x.shape[0] > EXACT_PARTS
        out = weighted_grouped_matmul(
            inner,
            down,
            groups,
            routes.weights,
            bias=bias,
            beside=beside,
            out_dtype=x.dtype if wide else jnp.float32,
            backend=backend,
        )
        out = self._of_own(out.swapaxes(0, 1), routes).swapaxes(0, 1)
        return self._summed(out, x.dtype)

    def _by_xla(self, x: Float[Array, "T E"], routes: Routes) -> Float[Array, "T E"]:
        tokens, choices = routes.experts.shape
        groups = group_rows(routes.experts.reshape(-1), self.gate_up.weight.shape[0])
        rows = x[groups.source // choices]
        both = self.gate_up(rows, groups, out_dtype=x.dtype)
        both = (
            both
            if self.gate_up.bias is None
            else both + self.gate_up.bias[...].at[groups.group].get(mode="clip")
        )
        inner = self.gating(*jnp.unstack(both, axis=1))
        out = self.down(inner, groups, out_dtype=jnp.float32)[groups.place].reshape(tokens, choices, -1)
        out = self._of_own(out, routes)
        mixed = jnp.einsum("tke,tk->te", out, routes.weights).astype(x.dtype)
        all_reduce = self.kernels.collectives.all_reduce
        if self.down.bias is None:
            return all_reduce(mixed, x.dtype)
        bias = self._bias(routes, x.dtype)
        if self.kernels.ep == 1:  # every device has all biases: they are added once
            return all_reduce(mixed, x.dtype) + bias
        return all_reduce(mixed + bias / (self.kernels.tp // self.kernels.ep), x.dtype)

    def _bias(self, routes: Routes, dtype: DTypeLike) -> Float[Array, "T E"]:
        assert self.down.bias is not None
        chosen = self.down.bias[...].at[routes.experts].get(mode="clip")
        return jnp.einsum("tke,tk->te", chosen.astype(jnp.float32), routes.weights).astype(dtype)


class Mixture(nnx.Module):
    """Some experts for each token, and perhaps a block that all tokens share; called as a `GatedMLP` is.
    Experts may work in a smaller space, into which `into_latent` leads and from which `from_latent` does.
    """

    def __init__(
        self, hidden: int, config: MixtureConfig, *, added_plainly: bool, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.weigh_inputs, self.shared_scale = config.weigh_inputs, config.shared_scale
        self.router = Router(hidden, config.router, dtype=dtype, backend=kernels.backend)
        latent, plain = config.latent_size, partial(Linear, bias=False, dtype=dtype)
        alone = not latent and (config.shared is None or kernels.tp == 1)
        rest: dict[str, Any] = {"dtype": dtype, "kernels": kernels}
        self.experts = Experts(latent or hidden, config, added_up=added_plainly and alone, **rest)
        self.into_latent = plain((latent,), (hidden,), (None, "embed")) if latent else None
        self.from_latent = plain((hidden,), (latent,), ("embed", None)) if latent else None
        self.shared = (
            None
            if config.shared is None
            else feed_forward(hidden, config.shared, added_plainly=False, dtype=dtype, kernels=kernels)
        )
        self.shared_gate = (
            Linear((1,), (hidden,), (None, "embed"), bias=False, dtype=dtype) if config.shared_gate else None
        )

    def __call__(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], NextDelta]:
        """`Kernels.add_norm` of the arguments, and the mixture -> x, what is added to it next."""
        return self.routed(x, delta, norm)[:2]

    def routed(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], NextDelta, Int32[Array, "T k"]]:
        """The same, and each token's experts."""
        x, normed, routes = self.router.behind_norm(self.kernels, x, delta, norm)
        inputs = _through(self.into_latent, normed)
        shared = None if self.shared is None else self._shared(normed)
        if shared is not None:  # goes before the experts, so that a CUDA graph does it beside them
            shared, inputs = lax.optimization_barrier((shared, inputs))
        beside = shared if self.experts.added_up else None
        out = self.experts(*(_weighed(inputs, routes) if self.weigh_inputs else (inputs, routes)), beside)
        if self.experts.added_up:
            return x, out, routes.experts
        out = summed(out)
        out = out.sum(0, dtype=jnp.float32).astype(x.dtype) if out.ndim == 3 else out
        out = _through(self.from_latent, out)
        return x, out if shared is None else out + shared, routes.experts

    def _shared(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        assert self.shared is not None
        out = summed(self.shared(x, None, None)[1])
        out = out if self.shared_scale == 1.0 else out * self.shared_scale
        if self.shared_gate is None:
            return out
        return out * jax.nn.sigmoid(dense_product(x, self.shared_gate.weight.dense()))


def _through(linear: Linear | None, x: Float[Array, "*parts E"]) -> Float[Array, "*parts N"]:
    return x if linear is None else dense_product(x, linear.weight.dense())


def _weighed(x: Float[Array, "T E"], routes: Routes) -> tuple[Float[Array, "T E"], Routes]:
    """The inputs of each token's one expert, whose output then counts as it is."""
    weights = routes.weights.astype(x.dtype)
    return x * weights, routes._replace(weights=jnp.ones_like(routes.weights))


class MixtureBesideMLP(nnx.Module):
    """Experts beside a block that every token has, each with norms of its own before and behind it; the
    router has one too, of the residual stream (Gemma 4). Called as a `GatedMLP` is; its norm is the block's.
    """

    def __init__(
        self, model: DecoderConfig, config: MixtureConfig, *, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        assert config.shared is not None

        def norm() -> RMSNorm:
            return RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset, dtype=dtype, axis="embed")

        hidden = model.hidden_size
        how: dict[str, Any] = {"dtype": dtype, "kernels": kernels}
        self.kernels = kernels
        self.shared = GatedMLP(hidden, config.shared, added_plainly=False, **how)
        self.shared_post_norm = norm()
        self.router_norm = norm()
        self.router = Router(hidden, config.router, dtype=dtype, backend=kernels.backend)
        self.experts_norm = norm()
        self.experts = Experts(hidden, config, added_up=False, **how)
        self.experts_post_norm = norm()

    def __call__(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
        return self.routed(x, delta, norm)[:2]

    def routed(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"], Int32[Array, "T k"]]:
        """As `Mixture.routed`."""
        x, normed = self.kernels.add_norm(x, delta, norm)
        shared = summed(self.shared(normed, None, None)[1])
        routes = self.router(self.router_norm(x) * jnp.asarray(x.shape[1] ** -0.5, x.dtype))
        out = summed(self.experts(self.experts_norm(x), routes))
        out = out.sum(0, dtype=jnp.float32).astype(x.dtype) if out.ndim == 3 else out
        return x, self.shared_post_norm(shared) + self.experts_post_norm(out), routes.experts


@cache  # layers alike must have the same function, so that they are traced once
def gating(config: MlpConfig) -> Gating:
    """What an expert makes of gate and up, or, where it is not gated, of its one product."""
    if config.activation == "swigluoai":
        return partial(_swigluoai, config.limit)
    activation = ACTIVATIONS[config.activation]
    return (lambda gate, up: activation(gate) * up) if config.gated else activation


def _swigluoai(limit: float, gate: Array, up: Array) -> Array:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * (gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate))
