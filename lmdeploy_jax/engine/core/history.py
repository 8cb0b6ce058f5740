"""What penalties and biases know of each slot's sequence."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.engine.core.program import Programs
from lmdeploy_jax.engine.core.state import History, Update
from lmdeploy_jax.engine.request import Draws, Sequence
from lmdeploy_jax.sampling.penalties import bias_row, count_row


class Histories:
    """Keeps the history of each slot up to date, on the device from the first request on that needs one."""

    def __init__(self, programs: Programs) -> None:
        self._state, self._vocab_size = programs.state, programs.state.vocab_size
        self._biased: set[int] = set()  # slots whose bias row is not zero
        slot, counts = self._state.ints(), self._state.ints(self._vocab_size)
        bias, new = (
            self._state.floats(self._vocab_size),
            partial(new_history, specs=self._state.specs["history"]),
        )
        writes = ("history",)
        self._new = programs.add("new_history", new, writes=writes)
        self._set = programs.add(
            "set_history", set_history, writes=writes, slot=slot, counts=counts, bias=bias
        )
        self._set_bias = programs.add("set_bias", set_bias, writes=writes, slot=slot, bias=bias)

    def begin(self, sequence: Sequence) -> None:
        """Start the history of an admitted sequence, if its sampling reads one."""
        slot = sequence.slot
        if sequence.params.reshapes_logits:
            # Those known alone: a token that the step under way draws is counted as generated already.
            prompt, generated = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
            counts = count_row(prompt, generated, self._vocab_size)
            self._start(slot, counts, self._bias(sequence, len(generated)))
        elif slot in self._biased:
            self._start(slot, np.zeros(self._vocab_size, np.int32), np.zeros(self._vocab_size, np.float32))
            self._biased.discard(slot)

    def allocate(self) -> None:
        """Allocate the arrays on the device, unless they are there."""
        if self._state.history is None:
            self._new()

    def forget(self) -> None:
        """Take note that the state has given the arrays back: the next `allocate` makes new ones."""
        self._biased.clear()

    def lift_early_ban(self, draws: Draws) -> None:
        """Allow the stop ids again for sequences that now draw the first token after `min_new_tokens`."""
        for sequence, _ in draws:
            params = sequence.params
            drawing = sequence.num_generated - 1  # index of the token that is being drawn
            if params.min_new_tokens and params.stop_token_ids and drawing == params.min_new_tokens:
                self._set_bias(slot=np.int32(sequence.slot), bias=self._bias(sequence, drawing))

    def _start(self, slot: int, counts: np.ndarray, bias: np.ndarray) -> None:
        self.allocate()
        self._set(slot=np.int32(slot), counts=counts, bias=bias)
        self._biased.add(slot)

    def _bias(self, sequence: Sequence, generated: int) -> np.ndarray:
        params = sequence.params
        early = params.stop_token_ids if generated < params.min_new_tokens else ()
        return bias_row(self._vocab_size, dict(params.logit_bias), [*params.banned_token_ids, *early])


def new_history(*, specs: History) -> tuple[None, Update]:
    """Histories of sequences without tokens."""
    return None, Update(history=jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs))


def set_history(history: History, slot: Array, counts: Array, bias: Array) -> tuple[None, Update]:
    """Start a slot's history: counts i32 [V], bias f32 [V]."""
    return None, Update(history=History(history.counts.at[slot].set(counts), history.bias.at[slot].set(bias)))


def set_bias(history: History, slot: Array, bias: Array) -> tuple[None, Update]:
    """Replace a slot's biases."""
    return None, Update(history=History(history.counts, history.bias.at[slot].set(bias)))
