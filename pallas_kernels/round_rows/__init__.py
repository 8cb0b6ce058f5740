"""Activations rounded to 8 bits, with a scale for each row, or for each run of columns in a row."""

from __future__ import annotations

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from lmdeploy_jax.pallas_kernels.registry import check_backend
from lmdeploy_jax.pallas_kernels.round_rows import xla
from lmdeploy_jax.pallas_kernels.shapes import Quantised

__all__ = ["check_groups", "round_rows"]


def round_rows(
    x: Float[Array, "T K"],
    dtype: DTypeLike,
    *,
    groups: int = 1,
    scale: Float32[Array, "1"] | None = None,
    backend: str = "xla",
) -> Quantised:
    """x [T, K] as values [T, K] of `dtype` (int8 or a float of 8 bits) and scales f32 [groups, T].

    A group's largest element becomes the largest that there is, or, with one `scale` for all, what is larger
    than that becomes it. Raises ValueError for groups that do not fit.
    """
    check_backend(backend)
    check_groups(x.shape[1], groups)
    if backend == "xla" or scale is not None:  # which asks for no maximum, and so is one kernel of XLA's
        return xla.round_rows(x, dtype, groups, scale)
    from lmdeploy_jax.pallas_kernels.round_rows import pallas  # CPUs never need it

    return pallas.round_rows(x, dtype, groups, interpret=backend == "pallas_interpret")


def check_groups(columns: int, groups: int) -> None:
    """Raises ValueError where columns cannot be cut into groups of one size."""
    if columns % groups:
        raise ValueError(f"{columns} columns cannot be cut into {groups} groups of one size")
