"""Masks of the tokens that a grammar allows, a bit a token."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

OPEN = -1  # a word that allows all of its 32 tokens


def mask_words(vocab: int) -> int:
    """Words in a row of a mask: a bit for each token, and one for the end of the answer."""
    return vocab // 32 + 1


def apply_mask(logits: Array, mask: Array) -> Array:
    """-inf for what the mask forbids: `logits` f32 [R, V], `mask` i32 [R, mask_words(V)]."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.int32) & 1
    allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(allowed, logits, -jnp.inf)
