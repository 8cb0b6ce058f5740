"""Packets between GPUs that address each other's memory, as NCCL's protocol LL has them: 4 bytes of data and
4 of a flag in one store of 8, which no reader sees halved: data is there when its flag is, without a fence.

A *workspace* a device holds what its peers have stored for it. The flag is the number of the exchange, which
the device itself counts, a number a row: a CUDA graph's arguments stay as they were when it was recorded.
Numbers of both parities have places of their own. Who stores number e + 2 has read number e + 1 of the peer,
which therefore has read number e: that is what keeps a place from being overwritten while it is read.

All functions work on the device, by inline assembly: neither XLA nor Triton knows of the memory they touch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Shaped

WORDS = 4  # of data, 4 bytes each, that an instance of the assembly moves: two stores of 16 bytes
MOST_READS = 1 << 25  # of a place, tens of seconds, before the program gives up
OWN = 3  # columns of a table of peers before the peers' addresses
NOWHERE = -1  # the offset of what no packet carries
MOST_ROWS = 256  # of an exchange
HEADER_BYTES = 4 * MOST_ROWS  # before the packets: a row's number each


@dataclass(frozen=True)
class Workspace:
    """Where things lie in a device's workspace: `rows` rows of `row_bytes` of data from each device."""

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
        return HEADER_BYTES + 2 * self.devices * self.rows * 2 * self.row_bytes

    def row(
        self, number: Int32[Array, "*N"], sender: Int32[Array, ""] | int, row: Int32[Array, ""]
    ) -> Int32[Array, "*N"]:
        """The offset in bytes of a sender's row in the exchange of that number."""
        place = ((number & 1) * self.devices + sender) * self.rows + row
        return HEADER_BYTES + place * (2 * self.row_bytes)


@dataclass(frozen=True)
class Address:
    """The address of a device's workspace, in two halves i32."""

    low: Int32[Array, ""]
    high: Int32[Array, ""]


class Peers:
    """A device's own table i32 [1, OWN + 2n]: its rank, its workspace's address, those of all ranks."""

    def __init__(self, table: jax.Ref) -> None:
        self.rank, self.own = table[0, 0], Address(table[0, 1], table[0, 2])
        pairs = range(OWN, table.shape[1], 2)
        self.all = [Address(table[0, i], table[0, i + 1]) for i in pairs]


def elements(dtype: DTypeLike) -> int:
    """Of such a dtype, that an instance of the assembly moves."""
    return 4 * WORDS // jnp.dtype(dtype).itemsize


def read_number(own: Address, row: Int32[Array, ""], like: Shaped[Array, "N"]) -> Int32[Array, "N"]:
    """The number of the exchange that this row is about to take part in, everywhere."""
    pack = elements(like.dtype)
    low, high, at = _operands(pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .b32 last; ld.volatile.global.b32 last, [at]; "
        + "".join(f"add.s32 ${i}, last, 1; " for i in range(pack))
        + "}"
    )
    constraints = ",".join(["=&r"] * pack + ["r"] * (3 * pack))
    offset, result = jnp.full(like.shape, row * 4), jax.ShapeDtypeStruct(like.shape, jnp.int32)
    return _packed(code, constraints, pack, result, *_everywhere(own, like), offset)


def end(
    own: Address, row: Int32[Array, ""], number: Int32[Array, "N"], last: Shaped[Array, "N"]
) -> Shaped[Array, "N"]:
    """`last`, 32 bits each, and the row's exchange has ended. To be called with what all of the program's
    threads have had a part in, after they had read all packets.
    """
    low, high, at, flag = _operands(2, 1, 1, 1, 1)
    code = (
        f"{_address(low, high, at)} .reg .pred one; .reg .b32 thread; mov.u32 thread, %tid.x; "
        f"setp.eq.u32 one, thread, 0; @one st.volatile.global.b32 [at], ${flag}; mov.b32 $0, $1; }}"
    )
    offset, result = jnp.full(last.shape, row * 4), jax.ShapeDtypeStruct(last.shape, jnp.int32)
    bits = lax.bitcast_convert_type(last, jnp.int32)
    arguments = (bits, *_everywhere(own, last), offset, number)
    return lax.bitcast_convert_type(_packed(code, "=r,r,r,r,r,r", 1, result, *arguments), last.dtype)


def exchanged(
    data: Shaped[Array, "padded"],
    size: int,
    peers: Peers,
    workspace: Workspace,
    number: Int32[Array, "padded"],
    row: Int32[Array, ""],
) -> Iterator[Shaped[Array, "padded"]]:
    """The first `size` elements of every device's `data`, by rank, once all have come."""
    column = jnp.arange(data.size, dtype=jnp.int32)
    within, flag = column * (2 * data.dtype.itemsize), number

    def places(sender: jax.Array | int) -> jax.Array:
        return jnp.where(column < size, workspace.row(number, sender, row) + within, NOWHERE)

    mine = places(peers.rank)
    for peer in peers.all:
        flag = push(data, peer, mine, flag)
    for sender in range(workspace.devices):
        yield poll(data.dtype, peers.own, places(sender), flag)


def push(
    data: Shaped[Array, "N"], peer: Address, offset: Int32[Array, "N"], number: Int32[Array, "N"]
) -> Int32[Array, "N"]:
    """Stores `data` as packets at those offsets of a peer's workspace -> `number`, for what comes after."""
    pack = elements(data.dtype)
    words, low, high, at, flag = _operands(pack, WORDS, pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred inside; setp.ge.s32 inside, ${at}, 0; "
        f"@inside st.volatile.global.v4.b32 [at], {{${words}, ${flag}, ${words + 1}, ${flag}}}; "
        f"@inside st.volatile.global.v4.b32 [at+16], {{${words + 2}, ${flag}, ${words + 3}, ${flag}}}; "
        + "".join(f"mov.b32 ${i}, ${flag + i}; " for i in range(pack))
        + "}"
    )
    constraints = ",".join(["=&r"] * pack + ["r"] * (WORDS + 4 * pack))
    arguments = (data, *_everywhere(peer, offset), offset, number)
    return _packed(code, constraints, pack, jax.ShapeDtypeStruct(offset.shape, jnp.int32), *arguments)


def poll(
    dtype: jnp.dtype, own: Address, offset: Int32[Array, "N"], number: Int32[Array, "N"]
) -> Shaped[Array, "N"]:
    """The data of packets at those offsets of the own workspace, once they have that number; zeros nowhere.

    A peer that does not come ends the program with an error of the device, which no program survives.
    """
    pack = elements(dtype)
    low, high, at, flag = _operands(WORDS, pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred inside, more; .reg .b32 reads, f<4>; "
        f"setp.ge.s32 inside, ${at}, 0; mov.b32 reads, 0; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@!inside bra DONE; "
        "AGAIN: "
        "ld.volatile.global.v4.b32 {$0, f0, $1, f1}, [at]; "
        "ld.volatile.global.v4.b32 {$2, f2, $3, f3}, [at+16]; "
        f"setp.ne.s32 more, f0, ${flag}; "
        + "".join(f"setp.ne.or.s32 more, f{i}, ${flag}, more; " for i in (1, 2, 3))
        + "@!more bra DONE; "
        f"add.s32 reads, reads, 1; setp.lt.s32 inside, reads, {MOST_READS}; @inside bra AGAIN; "
        "trap; DONE: }"
    )
    constraints = ",".join(["=&r"] * WORDS + ["r"] * (4 * pack))
    arguments = (*_everywhere(own, offset), offset, number)
    return _packed(code, constraints, pack, jax.ShapeDtypeStruct(offset.shape, dtype), *arguments)


def _address(low: int, high: int, offset: int) -> str:
    """Opens a block, in which `at` is the address that operands of these numbers tell."""
    return (
        f"{{ .reg .b64 at, by; mov.b64 at, {{${low}, ${high}}}; cvt.s64.s32 by, ${offset}; "
        "add.s64 at, at, by;"
    )


def _operands(*counts: int) -> list[int]:
    """The first operand's number of each group but the one before, given how many each group has."""
    return [sum(counts[: i + 1]) for i in range(len(counts) - 1)]


def _everywhere(address: Address, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.broadcast_to(address.low, like.shape), jnp.broadcast_to(address.high, like.shape)


def _packed(
    code: str, constraints: str, pack: int, result: jax.ShapeDtypeStruct, *arguments: jax.Array
) -> jax.Array:
    how: dict[str, Any] = {"constraints": constraints, "pack": pack, "result_shape_dtypes": [result]}
    return plt.elementwise_inline_asm(code, args=arguments, **how)[0]
