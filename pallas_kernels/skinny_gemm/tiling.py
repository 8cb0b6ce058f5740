"""How a skinny product is cut into programs; the best cut is measured, not known (`bench tune`)."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOKENS = 256  # rows of x that one tile holds at most
SHARED_BYTES = 225 << 10  # of a core, less what the compiler keeps for itself


@dataclass(frozen=True)
class Tiling:
    """A program multiplies `block_out` rows of the weight with all of x, `block_in` elements at a time.

    `splits` programs share the inner axis of the same outputs. x is padded to `min_rows`, 16 or 8, at least.
    What a weight of 8 bits is multiplied with is rounded by a kernel of its own, or is read in 16 bits:
    rounds: every program rounds it, a block with a scale for each row.
    widens: every program widens the weight instead.
    """

    block_out: int
    block_in: int
    splits: int
    num_warps: int
    num_stages: int
    min_rows: int = 16
    rounds: bool = False
    widens: bool = False

    @property
    def reads_wide(self) -> bool:
        """Whether x comes in 16 bits where the weight has 8."""
        return self.rounds or self.widens

    def check(self, tokens: int, inner: int, outputs: int) -> None:
        """Raises ValueError where a product cannot be cut so."""
        if inner % (self.splits * self.block_in):
            raise ValueError(
                f"an inner axis of {inner} elements cannot be cut into {self.splits} parts of whole blocks "
                f"of {self.block_in}"
            )


@dataclass(frozen=True)
class StreamTiling:
    """`programs` programs share the tiles of `block_out` outputs, each with `num_stages` blocks in flight.

    A tile is cut into `splits` along the inner axis, so that there are enough of them.
    overlaps: of quantised weights with scales of groups: whether a block is unpacked, or scaled, while tensor
    cores are at another one.
    """

    block_out: int
    programs: int
    num_stages: int
    splits: int = 1
    overlaps: bool = False

    def check(self, tokens: int, inner: int, outputs: int) -> None:
        """Raises ValueError where a product cannot be cut so."""
        sizes = {"rows": (tokens, 8), "inner elements": (inner, 64), "outputs": (outputs, self.block_out)}
        for name, (size, unit) in sizes.items():
            if size % unit:
                raise ValueError(f"{size} {name} cannot be streamed in whole blocks of {unit}")

    @staticmethod
    def deepest(block_out: int, programs: int, tokens: int) -> StreamTiling:
        """With as many stages as shared memory holds, where x and the outputs take groups of 64 rows."""
        rows = -(-tokens // 64) * 64
        stage = 2 * 64 * (rows + 2 * block_out)
        return StreamTiling(block_out, programs, (SHARED_BYTES - 2 * rows * block_out) // stage)
