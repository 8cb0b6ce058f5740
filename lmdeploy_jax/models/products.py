"""How a product with a weight is done: planned for each weight and number of rows, as a step is traced.

Activations are x [T, *inner], weights those of a `Linear` [*out, *inner]. Biases belong to the callers, since
a sum over devices gets its bias once; only gated products add theirs, which the activation has to see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear, Weight
from lmdeploy_jax.models.norm import Norm, RMSNorm
from lmdeploy_jax.models.quant_products import (
    FusedQuantNorm,
    PartsGatedProduct,
    QuantProduct,
    RoundedGatedProduct,
    RoundedProduct,
    RoundingNorm,
    Rows,
    RowsProduct,
    SkinnyQuantGatedProduct,
    SkinnyQuantProduct,
    StreamedQuantProduct,
    UnscaledQuantNorm,
    can_stream,
)
from lmdeploy_jax.models.quantised import QuantWeight
from lmdeploy_jax.models.residual import Delta, PartialSum
from lmdeploy_jax.models.tuning import Kind
from lmdeploy_jax.pallas_kernels.shapes import Unscaled
from lmdeploy_jax.pallas_kernels.skinny_gemm import (
    StreamTiling,
    Tiling,
    gated_skinny_gemm,
    norm_skinny_gemm,
    skinny_gemm,
    unscaled_norm_skinny_gemm,
)

Activation = Callable[[Array], Array]
Like = Float[Array, "T *inner"] | jax.ShapeDtypeStruct  # plans ask for no more than shape and dtype
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
TRANSPOSED_ROWS = range(2, 65)  # of a product that a CPU does faster with the weight on the left


# -- the products --------------------------------------------------------------------------------------


class Product(Protocol):
    """One way of doing a product."""

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        """-> [T, *out]; or, where the reader adds up parts, f32 [S, T, *out]."""


class NormProduct(Protocol):
    """One way of doing a product with the residual addition and the norm before it."""

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."]]:
        """`Kernels.add_norm` of x, delta and norm -> x [T, E], and the product with what is normalised."""


@dataclass(frozen=True)
class XlaProduct:
    """XLA's own; `out_dtype` None: x's dtype. `precision`: where XLA's choice would widen the weight."""

    out_dtype: DTypeLike | None = None
    precision: lax.DotAlgorithmPreset | None = None

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        weight = linear.weight.dense()
        return dense_product(x, weight, out_dtype=self.out_dtype, precision=self.precision)


@dataclass(frozen=True)
class TransposedProduct:
    """XLA's own, for CPUs: see `transposed_product`."""

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        columns = x.reshape(x.shape[0], -1).T
        flat = transposed_product(columns, linear.weight.dense().reshape(-1, columns.shape[0])).T
        return flat.reshape(x.shape[0], *linear.out_shape(x))


@dataclass(frozen=True)
class SkinnyProduct:
    """The hand-written product of a few rows, in f32 parts, or whole.

    Few tokens fill few cores unless the weight is cut along its inner axis too. XLA would sum the parts in a
    kernel of their own.
    """

    tiling: Tiling
    backend: str
    in_parts: bool = True
    biased: bool = False  # whether the linear layer's bias is a summand

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        rows = x.reshape(x.shape[0], -1)
        weight = linear.weight.dense().reshape(-1, rows.shape[1])
        bias = linear.bias[...] if self.biased and linear.bias is not None else None
        parts = skinny_gemm(rows, weight, self.tiling, bias=bias, out_dtype=jnp.float32, backend=self.backend)
        parts = parts.reshape(*parts.shape[:2], *linear.out_shape(x))
        return parts if self.in_parts else parts[0]


@dataclass(frozen=True)
class XlaGatedProduct:
    """`activation(gate) * up` of a weight [2, I, E] -> [T, I], of XLA's `product`."""

    activation: Activation
    product: Product | RowsProduct = XlaProduct()

    def __call__(self, linear: Linear, x: Rows) -> Float[Array, "..."]:
        both = self.product(linear, x)  # type: ignore[arg-type]  # rounded rows, as planned
        both = both if linear.bias is None else both + linear.bias[...]
        return self.activation(both[:, 0]) * both[:, 1]


@dataclass(frozen=True)
class TransposedGatedProduct:
    """The same for CPUs. The product that follows turns it again, so that XLA turns nothing in between."""

    activation: Activation

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        both = transposed_product(x.T, linear.weight.dense().reshape(-1, x.shape[1]))  # [2 I, T]
        both = both if linear.bias is None else both + linear.bias[...].reshape(-1, 1)
        gate, up = jnp.split(both, 2)
        return (self.activation(gate) * up).T


@dataclass(frozen=True)
class SkinnyGatedProduct:
    """The same, hand-written, for weights without a bias."""

    activation: Activation
    tiling: Tiling | StreamTiling
    backend: str

    def __call__(self, linear: Linear, x: Float[Array, "T *inner"]) -> Float[Array, "..."]:
        weight, tiling = linear.weight.dense(), self.tiling
        return gated_skinny_gemm(x, weight, tiling, activation=self.activation, backend=self.backend)


@dataclass(frozen=True)
class SeparateNorm:
    """The residual addition and the norm are a kernel of their own."""

    product: Product
    kernels: Kernels

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."]]:
        x, normed = self.kernels.add_norm(x, delta, norm)
        return x, self.product(linear, normed)


@dataclass(frozen=True)
class FusedNorm:
    """One kernel does all of it, for one row; the product is one part, or gated by `activation`."""

    tiling: Tiling
    backend: str
    activation: Activation | None = None

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Float[Array, "T E"], Float[Array, "..."]]:
        assert delta is not None  # as planned
        assert not isinstance(delta, PartialSum)
        assert isinstance(norm, RMSNorm)
        gated = self.activation is not None
        weight = linear.weight.dense()
        x, flat = norm_skinny_gemm(
            x,
            delta,
            norm.weight[...],
            weight if gated else weight.reshape(-1, x.shape[1]),
            self.tiling,
            activation=self.activation,
            eps=norm.eps,
            offset=norm.offset,
            out_dtype=x.dtype if gated else jnp.float32,
            backend=self.backend,
        )
        return x, flat if gated else flat.reshape(1, 1, *linear.out_shape(x))


@dataclass(frozen=True)
class UnscaledNorm:
    """The same in parts, without the norm's scale."""

    tiling: Tiling
    backend: str

    def __call__(
        self, linear: Linear, x: Float[Array, "T E"], delta: Float[Array, "*S T E"], norm: RMSNorm
    ) -> tuple[Float[Array, "T E"], Unscaled]:
        weight = linear.weight.dense().reshape(-1, x.shape[1])
        how: dict[str, Any] = {"eps": norm.eps, "offset": norm.offset, "backend": self.backend}
        return unscaled_norm_skinny_gemm(x, delta, norm.weight[...], weight, self.tiling, **how)


# -- the plan ------------------------------------------------------------------------------------------


def plan(kernels: Kernels, kind: Kind, linear: Linear, x: Like) -> Product:
    """The product with x, in parts or whole as `kind` says."""
    tiling = _tiling(kernels, kind, linear, x)
    if isinstance(linear.weight, QuantWeight):
        found = _plan_quant(kernels, kind, linear, x, tiling)
        return found or plan_xla(kernels, linear, x, out_dtype=jnp.float32 if kind == "whole" else None)
    if isinstance(tiling, Tiling):
        return SkinnyProduct(tiling, kernels.backend, in_parts=kind == "parts")
    if kind == "whole" and x.shape[0] == 1 and x.dtype == jnp.bfloat16 and kernels.without_triton:
        return XlaProduct(jnp.float32, lax.DotAlgorithmPreset.BF16_BF16_F32)
    return plan_xla(kernels, linear, x, out_dtype=jnp.float32 if kind == "whole" else None)


def plan_xla(kernels: Kernels, linear: Linear, x: Like, *, out_dtype: DTypeLike | None = None) -> Product:
    """XLA's product with x, for what is read neither in parts nor by a kernel."""
    if _rounded(linear):
        return RoundedProduct(out_dtype, kernels.rounding_backend)
    return TransposedProduct() if _transposed(kernels, x) else XlaProduct(out_dtype)


def plan_gated(kernels: Kernels, linear: Linear, x: Float[Array, "T E"], activation: Activation) -> Product:
    """`activation(gate) * up` of a weight [2, I, E]."""
    tiling = None if linear.bias is not None else _tiling(kernels, "gated", linear, x)
    if isinstance(linear.weight, QuantWeight):
        if isinstance(tiling, Tiling) and tiling.splits == 1:
            return SkinnyQuantGatedProduct(activation, tiling, kernels.backend)
        found = _plan_quant(kernels, "gated", linear, x, tiling)
        if found is not None:
            in_parts = found.tiling.splits > 1
            return PartsGatedProduct(activation, found) if in_parts else XlaGatedProduct(activation, found)
    elif tiling is not None and not (isinstance(tiling, StreamTiling) and x.shape[0] % 8):
        return SkinnyGatedProduct(activation, tiling, kernels.backend)
    if _transposed(kernels, x) and not _rounded(linear):
        return TransposedGatedProduct(activation)
    return XlaGatedProduct(activation, plan_xla(kernels, linear, x))


def plan_norm(
    kernels: Kernels,
    linear: Linear,
    x: Float[Array, "T E"],
    *,
    normed: bool,
    activation: Activation | None = None,
    reader: QuantWeight | None = None,
) -> NormProduct:
    """A product in parts, or a gated one, after a norm. `normed`: whether there are a delta and a norm;
    `reader`: that of a gated one, if a kernel is to round it for that.
    """
    kind: Kind = "norm_parts" if activation is None else "norm_gated"
    fusible = normed and (activation is None or linear.bias is None)
    tiling = _norm_tiling(kernels, kind, linear, x) if fusible else None
    if tiling is not None:
        fused = FusedQuantNorm if isinstance(linear.weight, QuantWeight) else FusedNorm
        return fused(replace(tiling, splits=1), kernels.backend, activation)
    product = (
        plan(kernels, "parts", linear, x)
        if activation is None
        else plan_gated(kernels, linear, x, activation)
    )
    sums = product.product if isinstance(product, XlaGatedProduct | PartsGatedProduct) else None
    if activation and reader is not None and linear.bias is None and isinstance(sums, QuantProduct):
        product = cast(Product, RoundedGatedProduct(activation, sums, reader, kernels.backend))
    if takes_rounded(linear, product):
        return RoundingNorm(cast(RowsProduct, product), kernels)
    return SeparateNorm(product, kernels)


def plan_unscaled(
    kernels: Kernels, linear: Linear, x: Float[Array, "T E"]
) -> UnscaledNorm | UnscaledQuantNorm | None:
    """A product in parts after a norm whose scale its reader applies, where that is the fastest."""
    tiling = _norm_tiling(kernels, "norm_parts", linear, x)
    if tiling is None or tiling.splits == 1:
        return None
    quantised = isinstance(linear.weight, QuantWeight)
    return (UnscaledQuantNorm if quantised else UnscaledNorm)(tiling, kernels.backend)


def _norm_tiling(kernels: Kernels, kind: Kind, linear: Linear, x: Array) -> Tiling | None:
    """Of one row, as measured; float16 might not hold what is not normed."""
    fusible = x.shape[0] == 1 and x.dtype == jnp.bfloat16
    tiling = _tiling(kernels, kind, linear, x) if fusible else None
    return tiling if isinstance(tiling, Tiling) else None


def _plan_quant(
    kernels: Kernels, kind: Kind, linear: Linear, x: Like, tiling: Tiling | StreamTiling | None
) -> SkinnyQuantProduct | StreamedQuantProduct | None:
    """A kernel's product with a quantised weight, without an activation."""
    if isinstance(tiling, Tiling):
        return SkinnyQuantProduct(tiling, kernels.backend, in_parts=kind != "whole")
    if tiling is None or kind == "whole":
        return None
    return StreamedQuantProduct(tiling, kernels.backend)


def _tiling(kernels: Kernels, kind: Kind, linear: Linear, x: Like) -> Tiling | StreamTiling | None:
    """As measured for the shapes that one device sees."""
    weight, inner, tokens = linear.weight, prod(x.shape[1:]), x.shape[0]
    if isinstance(weight, QuantWeight) and weight.operand(-1) is None:
        return None
    out = prod(linear.out_shape(x)) // (2 if kind.endswith("gated") else 1)
    streams = not isinstance(weight, QuantWeight) or can_stream(linear, tokens)
    found = kernels.tuning.find(weight.format, kind, (out, inner), tokens, streams=streams)
    if isinstance(found, Tiling) and found.rounds and _is_static(weight):
        return replace(found, rounds=False, widens=True)  # a block's own scale is not the file's
    return found


def _is_static(weight: Weight) -> bool:
    return isinstance(weight, QuantWeight) and weight.held.input_scale


def _rounded(linear: Linear) -> bool:
    return isinstance(linear.weight, QuantWeight) and linear.weight.held.rounds_activations


def takes_rounded(linear: Linear, product: object) -> bool:
    """Whether what a product reads is rounded by a kernel, which may be the one before it."""
    if isinstance(product, XlaGatedProduct | PartsGatedProduct | RoundedGatedProduct):
        product = product.product
    if isinstance(product, RoundedProduct):
        return product.backend != "xla"
    if isinstance(product, SkinnyQuantProduct | SkinnyQuantGatedProduct):
        return _has_rounded(linear) and not product.tiling.reads_wide
    return isinstance(product, StreamedQuantProduct) and _has_rounded(linear)


def _has_rounded(linear: Linear) -> bool:
    return isinstance(linear.weight, QuantWeight) and linear.weight.held.activations is not None


def _transposed(kernels: Kernels, x: Like) -> bool:
    return kernels.platform == "cpu" and x.dtype == jnp.float32 and x.shape[0] in TRANSPOSED_ROWS


# -- XLA's products ------------------------------------------------------------------------------------


def dense_product(
    x: Float[Array, "T *inner"], weight: Float[Array, "..."], *, out_dtype: Any = None, precision: Any = None
) -> Float[Array, "T *out"]:
    """x [T, *inner], weight [*out, *inner] -> [T, *out], in x's dtype or `out_dtype`.

    As one product of matrices: on CPUs, XLA copies a weight of more axes before it multiplies. float32 stays
    float32 on GPUs, whose default would be TF32.
    """
    tokens, out_shape = x.shape[0], weight.shape[: weight.ndim - x.ndim + 1]
    rows, columns = x.reshape(tokens, -1), weight.reshape(prod(out_shape), -1)
    flat = _dot(rows, columns, contracted=(1, 1), preferred_element_type=out_dtype, precision=precision)
    return flat.reshape(tokens, *out_shape)


def transposed_product(x: Float[Array, "K T"], weight: Float[Array, "N K"]) -> Float[Array, "N T"]:
    """weight @ x, the weight on the left.

    XLA's CPU products first copy their right side into another order, so it had better be the small one. The
    barriers keep XLA from exchanging the sides again.
    """
    return lax.optimization_barrier(_dot(weight, lax.optimization_barrier(x), contracted=(1, 0)))


def _dot(x: Array, y: Array, *, contracted: tuple[int, int], **how: Any) -> Array:
    left, right = contracted
    how |= {"precision": lax.Precision.HIGHEST} if x.dtype == jnp.float32 else {}
    return lax.dot_general(x, y, (((left,), (right,)), ((), ())), **how)
