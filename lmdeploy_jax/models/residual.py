"""What is added to the residual stream next: whole, in parts, or what devices have yet to add up."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32


class PartialSum(NamedTuple):
    """Each device's share of a sum, which the kernel of the next norm adds up over devices."""

    parts: Float[Array, "*S T E"]
    peers: Int32[Array, "1 K"]
    """See `lmdeploy_jax.parallel.peers`."""


Delta = Float[Array, "*S T E"] | PartialSum
"""What a part of a layer takes: [T, E], or parts [S, T, E] whose sum is meant."""

NextDelta = Float[Array, "*parts T E"] | PartialSum
"""The same of what it returns."""


def summed(delta: NextDelta) -> Float[Array, "*parts T E"]:
    """What is not added to the residual stream as it is: devices have added it up already."""
    assert not isinstance(delta, PartialSum)
    return delta
