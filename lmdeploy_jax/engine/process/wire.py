"""What the server's process and the engine's say to each other, pickled: only the two of them can write to
the connection.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from lmdeploy_jax.engine.facts import EngineFacts, EngineStats
from lmdeploy_jax.engine.request import SamplingParams, StepOutput
from lmdeploy_jax.errors import LmdeployError

# -- to the engine ----------------------------------------------------------------------------------------


class Submit(NamedTuple):
    """A request. `body` is a pickled `RequestBody`, so that one that cannot be read there costs no other."""

    request_id: int
    n: int
    body: bytes


class RequestBody(NamedTuple):
    """What a request asks. `params.grammar` stays behind: `grammar` is its `Source`, to be compiled again.

    prompt: the fields of its `EncodedPrompt`, which pickle as a dataclass at a third more time; images only
        where there are any.
    """

    prompt: tuple[Any, ...]
    params: SamplingParams
    streams: bool
    arrival: float
    grammar: tuple[str, int] | None


class Abort(NamedTuple):
    """See `EngineBase.abort`."""

    request_id: int
    sequence: int | None


class Call(NamedTuple):
    """A method of the engine that is waited for, told apart by `number`."""

    number: int
    method: str
    args: tuple[Any, ...]


# -- from the engine --------------------------------------------------------------------------------------


class State(NamedTuple):
    """What the engine's properties say."""

    stats: EngineStats
    sleeping: bool
    failure: str | None


class Ready(NamedTuple):
    """The engine has started."""

    facts: EngineFacts
    state: State


class Failed(NamedTuple):
    """It could not."""

    error: BaseException


class Reply(NamedTuple):
    """The end of a `Call`: what it raised, if it did."""

    number: int
    error: BaseException | None


class Update(NamedTuple):
    """Everything that has come up since the last message, in its order. steps: the tokens of each step."""

    state: State
    outputs: list[Packed | StepOutput]
    replies: list[Reply]
    steps: list[int]


# A StepOutput that is tokens and no more, as most are: a dataclass takes ten times as long to pickle.
Packed = tuple[int, int, list[int], Any, int | None, int, float]


def packed(out: StepOutput) -> Packed | StepOutput:
    """An output as it travels."""
    if out.error is not None:
        out.error = portable(out.error)
    elif not out.logprobs and all(
        x is None for x in (out.prompt_logprobs, out.logits, out.hidden, out.routes)
    ):
        return (
            out.request_id,
            out.index,
            out.token_ids,
            out.finish_reason,
            out.stop_token,
            out.cached_tokens,
            out.queue_seconds,
        )
    return out


def _rows(out: StepOutput) -> tuple[Any, ...]:
    """What most outputs do without."""
    return out.prompt_logprobs, out.logits, out.hidden, out.routes


def unpacked(sent: Packed | StepOutput) -> StepOutput:
    """What `packed` was given."""
    if isinstance(sent, StepOutput):
        return sent
    request_id, index, token_ids, reason, stop_token, cached, queued = sent
    out = StepOutput(request_id, index, token_ids, finish_reason=reason, stop_token=stop_token)
    out.cached_tokens, out.queue_seconds = cached, queued
    return out


def portable(error: BaseException) -> BaseException:
    """The error itself where its type is everyone's; else its description, since types of the engine's
    libraries would bring these libraries into the other process.
    """
    if type(error).__module__ in ("builtins", LmdeployError.__module__):
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:  # it holds something that cannot travel
            return LmdeployError(f"{type(error).__name__}: {error}")
    return LmdeployError(f"{type(error).__name__}: {error}")


def dumps(message: Any) -> bytes:
    """A message's bytes."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def receive(connection: Connection) -> Any:
    """The next message. Raises EOFError or OSError once the other side has gone."""
    return pickle.loads(connection.recv_bytes())
