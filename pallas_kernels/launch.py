"""The one place that launches Pallas kernels: through the Triton backend, or interpreted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# JAX warns at every lowering. Filtering is process-wide since lowering happens after the kernel was traced.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: its grid, Triton's tuning numbers, outputs that reuse an input's memory."""

    name: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    aliases: Mapping[int, int] = field(default_factory=dict)  # input index -> output index


def launch(
    kernel: Callable[..., None], how: Launch, out_shape: Any, *inputs: jax.Array | None, interpret: bool
) -> Any:
    """Runs `kernel` over whole-array refs of `inputs` (None stays None) and of outputs shaped `out_shape`.

    Raises ValueError for an array that Pallas would address wrongly.
    """
    present = [x for x in inputs if x is not None]
    for array in present:
        _check_offsets(array)
    whole_array = pl.BlockSpec()
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=how.grid,
        in_specs=[None if x is None else whole_array for x in inputs],
        out_specs=jax.tree.map(lambda _: whole_array, out_shape),
        input_output_aliases=dict(how.aliases),
        compiler_params=plt.CompilerParams(num_warps=how.num_warps, num_stages=how.num_stages),
        interpret=interpret,
        name=how.name,
    )(*inputs)


def _check_offsets(array: jax.Array) -> None:
    """Up to 4 GiB Pallas keeps signed 32-bit offsets: one-byte elements past 2 GiB get negative ones."""
    if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
        raise ValueError(
            f"an array of {array.size} one-byte elements cannot be addressed by a Pallas kernel: keep it at "
            "most 2 GiB (fewer cache pages, or more GPUs), or above 4 GiB"
        )
