"""What one forward pass reads besides weights and KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array
from jaxtyping import Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """Where the layers of one cache group find a step's sequences in the cache.

    Positions here count from the first token of the sequence's first page in the table: a group with a window
    keeps no pages that the window has passed, and attention only asks how far apart two tokens are. Decode
    steps have no `tiles`; ragged steps (prompt chunks, or chunks mixed with single decode tokens) have them.
    """

    slots: Int32[Array, "T"]  # where the token's K and V go: page * page_size + offset
    page_table: Int32[Array, "S M"]  # pages of each sequence in order; unused entries 0
    kv_lens: Int32[Array, "S"]  # tokens in the cache including this step's; 0 in padding rows
    tiles: Int32[Array, "W 4"] | None = None  # see lmdeploy_jax.pallas_kernels.prefill_attention
    lookahead: Int32[Array, "T"] | None = (
        None  # positions beyond its own that a token sees; None: no token does
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The tokens of one step, packed without padding between sequences.

    Decode steps carry one token a sequence (`T == S`). Padding tokens write to page 0 and have position 0.
    """

    tokens: Int32[Array, "T"]
    rope_positions: Int32[Array, "*axes T"]
    """What RoPE turns by: the 0-based position in the token's own sequence, or beside images in models with
    M-RoPE those of time, row and column, [3, T]."""
    rope_lens: Int32[Array, "T"]  # sequence length that dynamic NTK and longrope are scaled for
    attention: tuple[AttentionMetadata, ...]  # by cache group
    sequence_slots: Int32[Array, "S"]  # where state kept for a whole sequence lies; padding has one behind
    embeddings: Float[Array, "K F E"] | None = None
    """Of what is no text, as it enters the first layer, and what is added to it after each of the first
    K - 1 layers (DeepStack)."""
    embedding_index: Int32[Array, "T"] | None = None  # which of `embeddings` a token has; -1: its own
