"""The linear layers of a block, cut over devices as in Megatron-LM (Shoeybi et al., 2019)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Shaped

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Axes, Linear
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.products import (
    Activation,
    Like,
    Product,
    SkinnyProduct,
    plan,
    plan_norm,
    plan_unscaled,
    plan_xla,
    takes_rounded,
)
from lmdeploy_jax.models.quant_products import RowsProduct
from lmdeploy_jax.models.quantised import QuantWeight
from lmdeploy_jax.models.residual import Delta, PartialSum, SumOverDevices
from lmdeploy_jax.pallas_kernels.shapes import Quantised


class ColumnParallelLinear(Linear):
    """Each device has its own outputs; what enters is normed first. The bias is for the product's reader.

    activation: `weight` is [2, I, E], gate and up, and the product `activation(gate) * up`, bias included.
    """

    def __init__(
        self,
        out: tuple[int, ...],
        inner: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(out, inner, axes, bias=bias, dtype=dtype)
        self.kernels = kernels
        self.activation = activation

    def __call__(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."]]:
        """`Kernels.add_norm` of the arguments -> x, and the product: gated [T, I], or [T, *out], or
        f32 [S, T, *out], whose sum over S it is.
        """
        return self._product(x, delta, norm)

    def rounded(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None, reader: RowParallelLinear
    ) -> tuple[Float[Array, "T E"], Float[Array, "T I"] | Quantised]:
        """The same, gated, perhaps rounded as `reader` would round it: by the kernel that gates."""
        read = reader.reads_rounded(x.shape[0]) if self.kernels.rounds_gated else None
        return self._product(x, delta, norm, reader=read)

    def _product(self, x: Array, delta: Delta | None, norm: Norm | None, **how: Any) -> tuple[Array, Any]:
        normed = isinstance(norm, RMSNorm) and delta is not None and not isinstance(delta, PartialSum)
        product = plan_norm(self.kernels, self, x, normed=normed, activation=self.activation, **how)
        return product(self, x, delta, norm)

    def unscaled(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."], Float32[Array, "S"] | None]:
        """The same for a reader that can apply the norm's scale -> x, the product, and the `mean_squares` of
        an `Unscaled` one, if it is one.
        """
        if isinstance(norm, RMSNorm) and delta is not None and not isinstance(delta, PartialSum):
            product = plan_unscaled(self.kernels, self, x)
            if product is not None:
                x, (parts, mean_squares) = product(self, x, delta, norm)
                return x, parts.reshape(*parts.shape[:2], *self.out_shape(x)), mean_squares
        return *self(x, delta, norm), None


class RowParallelLinear(Linear, SumOverDevices):
    """Each device has its share of the inner axis: the product is the sum over devices.

    added_up: whether what reads it adds it to the residual stream as it is, and so might add up parts.
    """

    def __init__(
        self,
        out: tuple[int, ...],
        inner: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: jnp.dtype,
        kernels: Kernels,
        added_up: bool,
    ) -> None:
        super().__init__(out, inner, axes, bias=bias, dtype=dtype)
        self.kernels = kernels
        self.in_parts = added_up and (not bias or kernels.tp == 1)

    def __call__(self, x: Float[Array, "T *inner"] | Quantised) -> Float[Array, "..."] | PartialSum:
        """-> [T, *out], or f32 [S, T, *out], whose sum over S it is, or such a sum of this device alone."""
        like, dtype = self._like(x)
        product = self._plan(like)
        out = cast(RowsProduct, product)(self, x)
        left = self.left_to_norm(out, dtype) if self.in_parts else None
        if left is not None:
            return left
        out = self.kernels.collectives.all_reduce(out, dtype)
        if self.bias is None or (isinstance(product, SkinnyProduct) and product.biased):
            return out
        return out + self.bias[...]

    def _like(self, x: Float[Array, "T *inner"] | Quantised) -> tuple[Like, jnp.dtype]:
        """What the product is planned for, and the dtype of what it gives."""
        if not isinstance(x, Quantised):
            return x, x.dtype
        assert isinstance(self.weight, QuantWeight)  # which has asked for such rows
        return jax.ShapeDtypeStruct(x.values.shape, x.values.dtype), self.weight.dtype

    def reads_rounded(self, tokens: int) -> QuantWeight | None:
        """The weight, if the product of so many rows reads activations that a kernel has rounded."""
        if not isinstance(self.weight, QuantWeight):
            return None
        like = jax.ShapeDtypeStruct((tokens, *self.weight.shape[self.out_axes :]), self.weight.dtype)
        return self.weight if takes_rounded(self, self._plan(like)) else None

    def _plan(self, x: Like) -> Product:
        if not self.in_parts:
            return plan_xla(self.kernels, self, x)
        product = plan(self.kernels, "parts", self, x)
        if self.bias is None:
            return product
        if isinstance(product, SkinnyProduct):
            return replace(product, biased=True)
        return plan_xla(self.kernels, self, x)  # a bias would be a launch more beside parts


def whole(
    product: Shaped[Array, "*S T H N"], dtype: jnp.dtype, bias: Shaped[Array, "H N"] | None = None
) -> Shaped[Array, "T H N"]:
    """A product by head in one part, with its bias."""
    product = (product.sum(0) if product.ndim == 4 else product).astype(dtype)
    return product if bias is None else product + bias
