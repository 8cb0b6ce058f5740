"""Logits that Python changes: bad words of several tokens, and the user's own processors."""

from __future__ import annotations

from collections import abc

import numpy as np

from lmdeploy_jax.engine.request import Sequence
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.messages import LogitsProcessor


def change_logits(
    logits: np.ndarray, sequences: abc.Sequence[Sequence]
) -> tuple[np.ndarray, dict[Sequence, BaseException]]:
    """Apply to row i of `logits` f32 [R, V] what sequence i asks for; all its tokens must be known.

    Returns the logits and, by sequence, what its processors raised: user code ends its own sequence, no
    other.
    """
    errors: dict[Sequence, BaseException] = {}
    for i, sequence in enumerate(sequences):
        try:
            logits[i] = _changed(logits[i], sequence)
        except BaseException as error:  # user code may call sys.exit()
            errors[sequence] = error
    return logits, errors


def _changed(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    for banned in sequence.params.banned_sequences:
        head = list(banned[:-1])
        if sequence.tokens[-len(head) :] == head:
            logits[banned[-1]] = -np.inf
    for processor in sequence.params.logits_processors:
        logits = _processed(processor, sequence, logits)
    return logits


def _processed(processor: LogitsProcessor, sequence: Sequence, logits: np.ndarray) -> np.ndarray:
    shape = logits.shape
    try:
        array = np.asarray(processor(list(sequence.tokens), logits), np.float32)
    except BaseException as error:
        raise RequestError(
            f"logits processor {processor!r} failed: {type(error).__name__}: {error}"
        ) from error
    if array.shape != shape:
        raise RequestError(
            f"logits processor {processor!r} returned an array of shape {array.shape}; it must keep {shape}."
        )
    if np.isnan(array).any():
        raise RequestError(f"logits processor {processor!r} returned NaN; -inf rules a token out.")
    return array
