"""Reading a sampling call's results back, and deciding which sequences they end."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmdeploy_jax.engine.core.steps import Drawn
from lmdeploy_jax.engine.request import Sequence, StepOutput, TokenLogprobs
from lmdeploy_jax.errors import LogitsError
from lmdeploy_jax.messages import FinishReason
from lmdeploy_jax.sampling.sampler import EMPTY, NAN

NO_TOKEN = {
    NAN: "The model's logits are NaN, so that no token can be drawn. The weights may hold NaN, or values may "
    "have grown too large for the dtype: float16 ends at 65504; try dtype='bfloat16' or 'float32'.",
    EMPTY: "Every token is ruled out (bad words, bad_token_ids, logit_bias, a grammar, a logits processor), "
    "so that none can be drawn.",
}


@dataclass
class Accepted:
    """What a draw adds to its sequence: the tokens that count, and why the last ends it if it does.

    stop_token: the stop id that ended it. error: why there is no token, with finish_reason "error".
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: BaseException | None = None


def read_tokens(drawn: Drawn) -> tuple[list[list[int]], np.ndarray | None]:
    """Waits for a step: the tokens of each draw, and the packed log-probabilities where it has them."""
    if not drawn.draws:
        drawn.tokens.block_until_ready()
        return [], None
    values = np.asarray(drawn.tokens)
    counts = np.asarray(drawn.counts).tolist()
    tokens = [
        row[:count] for row, count in zip(values.tolist(), counts, strict=False)
    ]  # rows of padding follow
    return tokens, values if drawn.packed else None


def unpack_logprobs(row: np.ndarray, top: int) -> TokenLogprobs:
    """One row of `reports.pack_logprobs`, with the `top` best alternatives."""
    k = (len(row) - 2) // 2
    logprob = float(row[1:2].view(np.float32)[0])
    values = row[2 + k : 2 + k + top].view(np.float32)
    return TokenLogprobs(logprob, dict(zip(row[2 : 2 + top].tolist(), values.tolist(), strict=True)))


def accept(sequence: Sequence, drawn: abc.Sequence[int], most: int, session_len: int) -> Accepted:
    """Append the tokens read for a sequence, up to the one that ends it. The scheduler has counted on `most`
    of them; of those that did not come, nothing is computed either.
    """
    accepted = Accepted()
    sequence.unread -= most
    sequence.computed -= most - len(drawn)
    for token in drawn:
        try:
            reason, stop = _accept(sequence, token, session_len)
        except BaseException as error:  # a panic of the grammar library is no Exception
            accepted.finish_reason, accepted.error = "error", error
            break
        accepted.tokens.append(token)
        if reason:
            accepted.finish_reason, accepted.stop_token = reason, stop
            break
    return accepted


def _accept(sequence: Sequence, token: int, session_len: int) -> tuple[FinishReason | None, int | None]:
    """Raises LogitsError where the device found none, RequestError for one that the grammar forbids."""
    if token in NO_TOKEN:
        raise LogitsError(NO_TOKEN[token])
    tokens, params = sequence.tokens, sequence.params
    tokens.append(token)
    if token in params.stop_token_ids and len(tokens) - sequence.num_prompt > params.min_new_tokens:
        return "stop", token
    if sequence.matcher is not None:
        sequence.matcher.advance(token)
        if sequence.matcher.complete:
            return "stop", None
    if sequence.ngram is not None and sequence.ngram.feed(token):
        return "stop", None
    if len(tokens) >= sequence.max_length or len(tokens) >= session_len:
        return "length", None
    return None, None


def output_of(
    sequence: Sequence, drawn: Drawn, i: int, accepted: Accepted, packed: np.ndarray | None
) -> StepOutput:
    """The StepOutput for draw `i`."""
    request, top = sequence.request, sequence.params.logprobs
    out = StepOutput(request.request_id, sequence.index, accepted.tokens, cached_tokens=sequence.cached)
    out.finish_reason, out.stop_token = accepted.finish_reason, accepted.stop_token
    out.error, out.queue_seconds = accepted.error, request.queue_seconds
    if not out.token_ids:
        return out
    if top is not None and packed is not None:
        out.logprobs = [unpack_logprobs(packed[i], top)]
    if drawn.logits:  # and then the others are there too
        out.logits, out.hidden = _rows(drawn.logits[i]), _rows(drawn.hidden[i])
        out.routes = _rows(drawn.routes[i])
    if sequence.report is not None:
        _add_prompt(out, sequence)
    return out


def _add_prompt(out: StepOutput, sequence: Sequence) -> None:
    """The prompt's share, told once, with the first token."""
    report, params = sequence.report, sequence.params
    sequence.report = None
    assert report is not None
    if params.prompt_logprobs is not None:
        rows = [row for piece in report.logprobs for row in piece]
        out.prompt_logprobs = [None, *(unpack_logprobs(row, params.prompt_logprobs) for row in rows)]
    out.logits = _joined(report.logits, out.logits)
    out.hidden = _joined(report.hidden, out.hidden)
    out.routes = _joined(report.routes, out.routes)


def _rows(row: np.ndarray | None) -> Any:
    return None if row is None else row[None]


def _joined(prompt: list[np.ndarray], generated: Any) -> Any:
    """Prompt positions 0 .. n-1. The last of them is the row that the first token was drawn from."""
    return np.concatenate(prompt) if prompt else generated
