"""What GPUs that address each other's memory store there for each other, without a flag and without a fence.

A *workspace* a device holds what its peers have stored for it. A place there is empty until its words have
come: `EMPTY` is a word that no data has, and who has read a place empties it, as in TensorRT-LLM's Lamport
kernels. A word of 4 bytes is never seen halved, and each is looked at, so that it does not matter in which
order they come. A device counts its exchanges, a number a row, since a CUDA graph's arguments stay as they
were when it was recorded; numbers of both parities have places of their own. Who stores number e + 2 has read
number e + 1 of the peer, whose kernel of number e has therefore ended: its places are empty again.

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

from lmdeploy_jax.pallas_kernels.workspace import EMPTY, OWN, WORDS, Workspace, elements

MOST_READS = 1 << 25  # of a place, tens of seconds, before the program gives up
NOWHERE = -1  # the offset of what is not moved


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


class Exchange:
    """One row's exchange of `size` elements of a dtype with all devices, by one program.

    `columns` are those of a row, padded; `share` and what comes are arrays over them.
    """

    def __init__(
        self,
        peers: Peers,
        workspace: Workspace,
        row: Int32[Array, ""],
        columns: Int32[Array, "N"],
        size: int,
        dtype: DTypeLike,
    ) -> None:
        self.peers, self.workspace, self.row = peers, workspace, row
        self.columns, self.size, self.dtype = columns, size, jnp.dtype(dtype)
        self.pack = elements(dtype)
        self.number = read_number(peers.own, row, columns, self.pack)

    def shares(self, share: Shaped[Array, "N"]) -> Iterator[Shaped[Array, "N"]]:
        """What every device has given, by rank, once all have come."""
        number, mine = self.number, self.peers.rank
        for holder, peer in enumerate(self.peers.all):
            number = push(share, peer, self._places(mine, holder), number)
        for sender in range(self.workspace.devices):
            came = poll(self.dtype, self.peers.own, self._places(sender, mine), number)
            yield jnp.where(mine == sender, share, came)

    def end(self, last: Shaped[Array, "N"]) -> Shaped[Array, "N"]:
        """`last`, 32 bits each, and the places are empty for the exchange after the next. It has to be what
        all of the program's threads have had a part in, after they had read all shares.
        """
        bits = lax.bitcast_convert_type(last, jnp.int32)
        for sender in range(self.workspace.devices):
            bits = clear(self.peers.own, self._places(sender, self.peers.rank), bits, self.pack)
        bits = count(self.peers.own, self.row, self.number, bits, self.pack)
        return lax.bitcast_convert_type(bits, last.dtype)

    def _places(self, sender: Int32[Array, ""] | int, holder: Int32[Array, ""] | int) -> Int32[Array, "N"]:
        """Of a sender's row in a holder's workspace; what a device has itself goes nowhere."""
        start = self.workspace.row(self.number, sender, self.row)
        moved = (self.columns < self.size) & (sender != holder)
        return jnp.where(moved, start + self.columns * self.dtype.itemsize, NOWHERE)


def read_number(own: Address, row: Int32[Array, ""], like: Int32[Array, "N"], pack: int) -> Int32[Array, "N"]:
    """The number of the exchange that this row is about to take part in, everywhere."""
    low, high, at = _operands(pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .b32 last; ld.volatile.global.b32 last, [at]; "
        + "".join(f"add.s32 ${i}, last, 1; " for i in range(pack))
        + "}"
    )
    return _packed(code, pack, pack, jnp.int32, *_everywhere(own, like), jnp.full(like.shape, row * 4))


def push(
    data: Shaped[Array, "N"], peer: Address, offset: Int32[Array, "N"], number: Int32[Array, "N"]
) -> Int32[Array, "N"]:
    """Stores `data` at those offsets of a peer's workspace -> `number`, for what comes after."""
    pack = elements(data.dtype)
    words, low, high, at, same = _operands(pack, WORDS, pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred inside, none; .reg .b32 w<4>; setp.ge.s32 inside, ${at}, 0; "
        + "".join(
            f"setp.eq.b32 none, ${words + i}, {EMPTY}; selp.b32 w{i}, 0, ${words + i}, none; "
            for i in range(WORDS)
        )
        + "@inside st.volatile.global.v4.b32 [at], {w0, w1, w2, w3}; "
        + _moved(same, pack)
    )
    return _packed(code, pack, pack, jnp.int32, data, *_everywhere(peer, offset), offset, number)


def poll(
    dtype: jnp.dtype, own: Address, offset: Int32[Array, "N"], number: Int32[Array, "N"]
) -> Shaped[Array, "N"]:
    """What has come at those offsets of the own workspace, once all of it has; zeros nowhere.

    A peer that does not come ends the program with an error of the device, which no program survives.
    """
    pack = elements(dtype)
    low, high, at = _operands(WORDS, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred inside, more; .reg .b32 reads; "
        f"setp.ge.s32 inside, ${at}, 0; mov.b32 reads, 0; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @!inside bra DONE; "
        "AGAIN: ld.volatile.global.v4.b32 {$0, $1, $2, $3}, [at]; "
        f"setp.eq.s32 more, $0, {EMPTY}; "
        + "".join(f"setp.eq.or.s32 more, ${i}, {EMPTY}, more; " for i in (1, 2, 3))
        + f"@!more bra DONE; add.s32 reads, reads, 1; setp.lt.s32 inside, reads, {MOST_READS}; "
        "@inside bra AGAIN; trap; DONE: }"
    )
    return _packed(code, WORDS, pack, dtype, *_everywhere(own, offset), offset, number)


def clear(own: Address, offset: Int32[Array, "N"], last: Int32[Array, "N"], pack: int) -> Int32[Array, "N"]:
    """`last`, and what lies at those offsets of the own workspace is empty."""
    low, high, at, bits = _operands(pack, pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred inside; .reg .b32 none; setp.ge.s32 inside, ${at}, 0; "
        f"mov.b32 none, {EMPTY}; @inside st.volatile.global.v4.b32 [at], {{none, none, none, none}}; "
        + _moved(bits, pack)
    )
    return _packed(code, pack, pack, jnp.int32, *_everywhere(own, offset), offset, last)


def count(
    own: Address, row: Int32[Array, ""], number: Int32[Array, "N"], last: Int32[Array, "N"], pack: int
) -> Int32[Array, "N"]:
    """`last`, and the row's exchange of that number is behind it."""
    low, high, at, new, bits = _operands(pack, pack, pack, pack, pack, pack)
    code = (
        f"{_address(low, high, at)} .reg .pred one; .reg .b32 thread; mov.u32 thread, %tid.x; "
        f"setp.eq.u32 one, thread, 0; @one st.volatile.global.b32 [at], ${new}; " + _moved(bits, pack)
    )
    offset = jnp.full(last.shape, row * 4)
    return _packed(code, pack, pack, jnp.int32, *_everywhere(own, last), offset, number, last)


def _address(low: int, high: int, offset: int) -> str:
    """Opens a block, in which `at` is the address that operands of these numbers tell."""
    return (
        f"{{ .reg .b64 at, by; mov.b64 at, {{${low}, ${high}}}; cvt.s64.s32 by, ${offset}; "
        "add.s64 at, at, by;"
    )


def _moved(first: int, pack: int) -> str:
    """Ends a block: the results are the operands from `first` on, which orders it before what takes them."""
    return "".join(f"mov.b32 ${i}, ${first + i}; " for i in range(pack)) + "}"


def _operands(*counts: int) -> list[int]:
    """The first operand's number of each group but the one before, given how many each group has."""
    return [sum(counts[: i + 1]) for i in range(len(counts) - 1)]


def _everywhere(address: Address, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.broadcast_to(address.low, like.shape), jnp.broadcast_to(address.high, like.shape)


def _packed(code: str, results: int, pack: int, dtype: DTypeLike, *arguments: jax.Array) -> jax.Array:
    """`code` over `pack` elements at a time, whose results take so many registers."""
    registers = sum(pack * max(argument.dtype.itemsize, 1) // 4 for argument in arguments)
    how: dict[str, Any] = {
        "constraints": ",".join(["=&r"] * results + ["r"] * registers),
        "pack": pack,
        "result_shape_dtypes": [jax.ShapeDtypeStruct(arguments[-1].shape, dtype)],
    }
    return plt.elementwise_inline_asm(code, args=arguments, **how)[0]
