"""Running an engine from a test: submit, wait, collect."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.base import EngineBase
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.prompt import EncodedPrompt
from tests.patience import PATIENCE


def config(cache_dir: object, **changes: object) -> JaxEngineConfig:
    """A small engine that compiles what a test needs and keeps it for the next test."""
    settings = {"max_batch_size": 8, "max_prefill_token_num": 96, "eager_mode": True, "session_len": 512}
    return JaxEngineConfig(**(settings | {"compile_cache_dir": str(cache_dir)} | changes))


@dataclass
class Result:
    """Everything one sequence has been told."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def last(self) -> StepOutput:
        return self.outputs[-1]

    @property
    def reason(self) -> str | None:
        return self.last.finish_reason


class Collector:
    """Gathers the outputs of a request's sequences. `on_first` is called once, with the first output."""

    def __init__(self, n: int = 1, on_first: Callable[[], None] | None = None) -> None:
        self.results = [Result() for _ in range(n)]
        self._open = n
        self._done = threading.Event()
        self._on_first = on_first

    def __call__(self, out: StepOutput) -> None:
        result = self.results[out.index]
        assert result.reason is None if result.outputs else True, "output after the end"
        result.outputs.append(out)
        result.tokens += out.token_ids
        if self._on_first:
            self._on_first()
            self._on_first = None
        if out.finish_reason:
            self._open -= 1
            if not self._open:
                self._done.set()

    def wait(self) -> list[Result]:
        assert self._done.wait(PATIENCE), "the engine did not finish a request"
        return self.results


Prompt = Sequence[int] | EncodedPrompt
Listener = Callable[[StepOutput], None]


def submit(engine: EngineBase, prompt: Prompt, collector: Listener, **params: object) -> Request:
    encoded = prompt if isinstance(prompt, EncodedPrompt) else EncodedPrompt(list(prompt))
    request = Request(encoded, SamplingParams(**({"max_new_tokens": 32} | params)), collector)
    engine.submit(request)
    return request


def generate(engine: EngineBase, prompts: Sequence[Prompt], **params: object) -> list[list[Result]]:
    """The results of all prompts, submitted at once; a list of n for each."""
    collectors = [Collector(int(params.get("n", 1))) for _ in prompts]
    for prompt, collector in zip(prompts, collectors, strict=True):
        submit(engine, prompt, collector, **params)
    return [collector.wait() for collector in collectors]


def tokens(engine: EngineBase, prompts: Sequence[Prompt], **params: object) -> list[list[int]]:
    """Only the tokens of each prompt's first sequence."""
    return [results[0].tokens for results in generate(engine, prompts, **params)]
