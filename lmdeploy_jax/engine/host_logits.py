"""Logits that Python changes: bad words of several tokens, and the user's own processors."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from lmdeploy_jax.engine.request import Sequence
from lmdeploy_jax.errors import RequestError


def change_logits(
    logits: np.ndarray, sequences: Seq[Sequence]
) -> tuple[np.ndarray, dict[Sequence, Exception]]:
    """Apply to row i of `logits` f32 [R, V] what sequence i asks for; all its tokens must be known.

    Returns the logits and, by sequence, what its processors raised: user code ends its own sequence, no
    other.
    """
    errors: dict[Sequence, Exception] = {}
    for i, sequence in enumerate(sequences):
        try:
            logits[i] = _changed(logits[i], sequence)
        except Exception as error:
            errors[sequence] = error
    return logits, errors


def _changed(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
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
