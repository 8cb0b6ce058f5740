"""What one sequence has been given while its reader was busy, merged."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy_jax.engine.request import StepOutput


class MergedOutput:
    """Several outputs of one sequence, in order, as one.

    They are merged as they come: Python's garbage collector would walk thousands of them that wait.
    """

    __slots__ = ("_out", "_rows")

    def __init__(self) -> None:
        self._out: StepOutput | None = None
        self._rows: tuple[list[Any], ...] | None = None  # of logits, hidden states, experts, where asked for

    def add(self, out: StepOutput) -> None:
        """Append one."""
        if out.logits is not None or out.hidden is not None or out.routes is not None:
            self._add_rows(out)
        first, self._out = self._out, out
        if first is not None:
            first.token_ids += out.token_ids
            out.token_ids = first.token_ids
            first.logprobs += out.logprobs
            out.logprobs = first.logprobs
            out.prompt_logprobs = out.prompt_logprobs or first.prompt_logprobs
            out.cached_tokens = max(first.cached_tokens, out.cached_tokens)

    def _add_rows(self, out: StepOutput) -> None:
        self._rows = self._rows or ([], [], [])
        for rows, new in zip(self._rows, (out.logits, out.hidden, out.routes), strict=True):
            rows.extend([] if new is None else [new])

    def result(self) -> StepOutput:
        """All that has been added, of which there must be something."""
        assert self._out is not None
        if self._rows is not None:
            logits, hidden, routes = (np.concatenate(rows) if rows else None for rows in self._rows)
            self._out.logits, self._out.hidden, self._out.routes = logits, hidden, routes
        return self._out
