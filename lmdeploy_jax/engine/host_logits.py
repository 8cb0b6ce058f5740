"""Logits that Python changes: bad words of several tokens, and the user's own processors."""

from __future__ import annotations

import numpy as np

from lmdeploy_jax.engine.request import Sequence
from lmdeploy_jax.errors import RequestError


def change_logits(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """f32 [V] -> f32 [V] for a sequence whose tokens are all known. Raises RequestError for a bad processor."""
    for banned in sequence.params.banned_sequences:
        head = list(banned[:-1])
        if sequence.tokens[-len(head) :] == head:
            logits[banned[-1]] = -np.inf
    for processor in sequence.params.logits_processors:
        logits = _checked(processor(list(sequence.tokens), logits), logits.shape, processor)
    return logits


def _checked(result: object, shape: tuple[int, ...], processor: object) -> np.ndarray:
    array = np.asarray(result, np.float32)
    if array.shape != shape:
        raise RequestError(
            f"logits processor {processor!r} returned an array of shape {array.shape}; it must keep {shape}."
        )
    return array
