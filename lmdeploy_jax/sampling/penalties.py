"""Penalties over what a sequence has said, and fixed biases per token.

`counts` i32 [slots, V] lives on the device: the low bits say how often a token was generated, `PROMPT_FLAG`
that it occurs in the prompt. `bias` f32 [slots, V] is added to the logits; -inf bans a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.sampling.params import SamplingBatch

PROMPT_FLAG = 1 << 30
MAX_BIAS = 100.0  # OpenAI's bound on logit_bias


def count_row(
    prompt_ids: Sequence[int] | np.ndarray, generated_ids: Sequence[int] | np.ndarray, vocab: int
) -> np.ndarray:
    """One row of `counts`, i32 [vocab]. Ids outside the vocabulary (image placeholders) are left out."""
    row = np.bincount(_within(generated_ids, vocab), minlength=vocab).astype(np.int32)
    row[_within(prompt_ids, vocab)] |= PROMPT_FLAG
    return row


def _within(ids: Sequence[int] | np.ndarray, vocab: int) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    return array[(array >= 0) & (array < vocab)]


def apply_penalties(logits: Array, counts_rows: Array, batch: SamplingBatch) -> Array:
    """Repetition penalty (HF's RepetitionPenaltyLogitsProcessor), then OpenAI's frequency and presence.

    Shapes: `logits` f32 [R, V], `counts_rows` i32 [R, V]; returns f32 [R, V].
    """
    generated = (counts_rows & (PROMPT_FLAG - 1)).astype(jnp.float32)
    penalty = batch.repetition[:, None]
    scaled = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(counts_rows != 0, scaled, logits)
    present = (generated > 0).astype(jnp.float32)
    return logits - batch.frequency[:, None] * generated - batch.presence[:, None] * present


def add_tokens(counts: Array, slots: Array, tokens: Array) -> Array:
    """Counts one generated token per row; a row with slot or token out of range (also below 0) is dropped."""
    size, vocab = counts.shape
    rows = jnp.where(slots < 0, size, slots)  # a negative index would count from the end
    columns = jnp.where(tokens < 0, vocab, tokens)
    return counts.at[rows, columns].add(1, mode="drop")


def bias_row(vocab: int, logit_bias: Mapping[int, float], banned: Iterable[int]) -> np.ndarray:
    """One row of `bias`, f32 [vocab]: biases clamped to ±100, banned ids -inf whatever their bias.

    Raises RequestError for ids outside the vocabulary and for a bias that is not a number.
    """
    banned_ids = list(banned)
    _check_ids(vocab, [*logit_bias, *banned_ids])
    if nan := [token for token, value in logit_bias.items() if np.isnan(value)]:
        raise RequestError(f"logit_bias of token ids {nan} is NaN; give a number between -100 and 100.")
    row = np.zeros(vocab, np.float32)
    for token, value in logit_bias.items():
        row[token] = np.clip(value, -MAX_BIAS, MAX_BIAS)
    row[banned_ids] = -np.inf
    return row


def _check_ids(vocab: int, ids: list[int]) -> None:
    if outside := sorted({token for token in ids if not 0 <= token < vocab}):
        raise RequestError(
            f"Token ids {outside} in logit_bias, bad words or stop words are outside the vocabulary; "
            f"ids run from 0 to {vocab - 1}."
        )
