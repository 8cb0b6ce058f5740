"""Where things lie in the memory in which GPUs store what the others wait for: see `peer_memory`."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

WORDS = 4  # of 4 bytes, that an instance of the assembly moves in one store
EMPTY = -(1 << 31)  # the bits of -0.0, which is sent as 0.0
OWN = 3  # columns of a table of peers before the peers' addresses
MOST_ROWS = 256  # of an exchange
HEADER_BYTES = 4 * MOST_ROWS  # before the places: a row's number each


@dataclass(frozen=True)
class Workspace:
    """Where things lie in a device's workspace: `rows` rows of `row_bytes` from each device."""

    devices: int
    row_bytes: int
    rows: int = MOST_ROWS

    @classmethod
    def of(cls, columns: int, size: int, dtype: DTypeLike) -> Workspace:
        """That of rows of `size` elements, where a table of peers has so many columns."""
        return cls((columns - OWN) // 2, size * jnp.dtype(dtype).itemsize)

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return HEADER_BYTES + 2 * self.devices * self.rows * self.row_bytes

    def row(
        self, number: Int32[Array, "*N"], sender: Int32[Array, ""] | int, row: Int32[Array, ""]
    ) -> Int32[Array, "*N"]:
        """The offset in bytes of a sender's row in the exchange of that number."""
        place = ((number & 1) * self.devices + sender) * self.rows + row
        return HEADER_BYTES + place * self.row_bytes


def elements(dtype: DTypeLike) -> int:
    """Of such a dtype, that an instance of the assembly moves."""
    return 4 * WORDS // jnp.dtype(dtype).itemsize
