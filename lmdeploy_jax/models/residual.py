"""What is added to the residual stream next: whole, in parts, or what devices have yet to add up."""

from __future__ import annotations

from typing import NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lmdeploy_jax.pallas_kernels.all_reduce_norm import why_not as why_not_peers


class PartialSum(NamedTuple):
    """Each device's share of a sum, which the kernel of the next norm adds up over devices."""

    parts: Float[Array, "*S T E"]
    peers: Int32[Array, "1 K"]
    """See `lmdeploy_jax.parallel.peers`."""


Delta = Float[Array, "*S T E"] | PartialSum
"""What a part of a layer takes: [T, E], or parts [S, T, E] whose sum is meant."""

NextDelta = Float[Array, "*parts T E"] | PartialSum
"""The same of what it returns."""


class SumOverDevices:
    """A module whose result is a sum over devices, each of which has a share of it."""

    peers: nnx.Variable | None = None
    """The table by which kernels reach other devices, where they do: see `share_peers`."""

    def left_to_norm(self, parts: Float[Array, "*S T E"], dtype: DTypeLike) -> PartialSum | None:
        """The sum as the kernel of the next norm takes it, if it can add up so many rows."""
        rows, size = parts.shape[-2:]
        if self.peers is None or why_not_peers(rows, size, dtype) is not None:
            return None
        return PartialSum(parts, self.peers[...])


def share_peers(module: nnx.Module, peers: Int32[Array, "1 K"]) -> None:
    """Give what sums over devices within `module` the table of peers."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, SumOverDevices):
            part.peers = nnx.Variable(peers)


def summed(delta: NextDelta) -> Float[Array, "*parts T E"]:
    """What is not added to the residual stream as it is: devices have added it up already."""
    assert not isinstance(delta, PartialSum)
    return delta
