"""Which states of recurrent layers a step copies: those behind cached prefixes, and those to be found."""

from __future__ import annotations

from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.request import Sequence


def cut_at_end(sequence: Sequence, count: int) -> int:
    """Of the next `count` tokens, those of a step: it ends where a state is to be kept."""
    return min([count, *(end - sequence.computed for end in sequence.state_ends if end > sequence.computed)])


def copy_states(step: Step, cache: CacheManager) -> None:
    """What the slots of admitted sequences begin with, at once, before another state takes its row; and what
    is kept behind the step. A state is kept of tokens that the host knows alone, so that none is of what a
    late stop cuts off.
    """
    for sequence in step.admitted:
        if sequence.state is not None:
            step.restored.append((sequence.state, sequence.slot))
            sequence.state = None
    for sequence in (chunk.sequence for chunk in step.chunks):
        if sequence.computed in sequence.state_ends:
            row = cache.keep_state(sequence.hashes, sequence.computed)
            if row is not None:
                step.kept.append((sequence.slot, row))
