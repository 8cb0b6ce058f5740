"""How a skinny product is cut into programs; the best cut is measured, not known (`bench tune`)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOKENS = 256  # rows of x that one tile holds at most


@dataclass(frozen=True)
class Tiling:
    """A program multiplies `block_out` rows of the weight with all of x, `block_in` elements at a time.

    `splits` programs share the inner axis of the same outputs.
    """

    block_out: int
    block_in: int
    splits: int
    num_warps: int
    num_stages: int

    def check(self, inner: int) -> None:
        """Raises ValueError where the inner axis cannot be cut so."""
        if inner % (self.splits * self.block_in):
            raise ValueError(
                f"an inner axis of {inner} elements cannot be cut into {self.splits} parts of whole blocks "
                f"of {self.block_in}"
            )


@dataclass(frozen=True)
class StreamTiling:
    """`programs` programs share the blocks of `block_out` rows of the weight; `num_stages` are in flight."""

    block_out: int
    programs: int
    num_stages: int
