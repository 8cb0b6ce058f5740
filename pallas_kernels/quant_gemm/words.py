"""4-bit elements in uint16 words: in a tile of columns, nibble q of word j is column q * tile / 4 + j."""

from __future__ import annotations

from math import gcd

import jax.numpy as jnp
from jaxtyping import Array, Shaped

PER_WORD = 4
TILE = 128  # columns that share words, where their number allows it
E2M1_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)  # by code


def tile_of(columns: int) -> int:
    """The columns that share words in a weight, or in a device's part of it, of so many."""
    return gcd(TILE, columns)


def pack_words(codes: Shaped[Array, "*out K"], tile: int) -> Shaped[Array, "*out words"]:
    """The inverse of `unpack_words`."""
    quarters = codes.reshape(*codes.shape[:-1], -1, PER_WORD, tile // PER_WORD).astype(jnp.uint16)
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)[:, None]
    words = (quarters << shifts).sum(-2, dtype=jnp.uint16)
    return words.reshape(*codes.shape[:-1], -1)


def unpack_words(words: Shaped[Array, "*out words"], tile: int) -> Shaped[Array, "*out K"]:
    """uint16 [..., K / 4] -> uint8 [..., K]."""
    tiles = words.reshape(*words.shape[:-1], -1, 1, tile // PER_WORD)
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)[:, None]
    return (tiles >> shifts & 15).astype(jnp.uint8).reshape(*words.shape[:-1], -1)
