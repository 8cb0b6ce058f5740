"""What an engine is to those who use it, whether it runs in their process or in one of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.facts import EngineFacts, EngineStats, Startup, check_request
from lmdeploy_jax.engine.forks import OwnerProcess
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.errors import EngineError, RequestError

if TYPE_CHECKING:
    from lmdeploy_jax.models.config import DecoderConfig

WEIGHTS, KV_CACHE = "weights", "kv_cache"
TAGS = (WEIGHTS, KV_CACHE)
ASLEEP = "The engine is sleeping; wake it up before inference."


class EngineBase(ABC):
    """Token ids in, token ids out. Every method may be called from any thread."""

    facts: EngineFacts
    owner: OwnerProcess
    in_process = True  # runs in this process, and needs its grammars compiled
    on_step: Callable[[int], None] | None = None  # told the tokens of each step that is dispatched

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError for one that cannot be served, EngineError when closed."""

    @abstractmethod
    def abort(self, request_id: int, index: int | None = None) -> None:
        """End a request, or one of its sequences. Unknown or finished ones are left alone.

        Until the first of n sequences has its first token the others hang on it, and end with it.
        """

    @abstractmethod
    def sleep(self, level: int = 1) -> None:
        """Abort what runs and give the device's memory back: the KV cache, and the weights.

        level: 1 keeps the weights in the host's memory, 2 reads them from disk when the engine wakes. Until
        `wake` requests are refused with an EngineError. Returns when it is done. Raises RequestError for
        another level, and then nothing is aborted.
        """

    @abstractmethod
    def wake(self, tags: Iterable[str] = TAGS) -> None:
        """Take the memory again: "weights", "kv_cache", or both; the engine serves once it has both.

        Raises RequestError for another tag, and then nothing is taken.
        """

    @property
    @abstractmethod
    def sleeping(self) -> bool:
        """Whether something that serving needs has been given back."""

    @property
    @abstractmethod
    def failure(self) -> str | None:
        """Why the engine can do no more, itself or because it was closed; None while it works."""

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """How the engine fares now."""

    @abstractmethod
    def close(self) -> None:
        """Abort what runs and stop. May be called twice; done at exit where the caller has not.

        A process that was forked from the engine's has nothing to close.
        """

    def __reduce__(self) -> NoReturn:
        raise TypeError("An engine cannot be handed to another process; open one there.")

    def _check(self, request: Request) -> None:
        self.owner.check()
        if self.sleeping:
            raise EngineError(ASLEEP)
        check_request(request, self.facts)

    @staticmethod
    def _check_level(level: int) -> None:
        if level not in (1, 2):
            raise RequestError(f"level={level} is invalid: it must be 1 or 2.")

    @staticmethod
    def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
        tags = tuple(tags)
        for tag in tags:
            if tag not in TAGS:
                raise RequestError(f"tag {tag!r} is unknown: give {' or '.join(TAGS)}.")
        return tags

    @property
    def folder(self) -> Path:
        return self.facts.folder

    @property
    def config(self) -> JaxEngineConfig:
        return self.facts.config

    @property
    def model_config(self) -> DecoderConfig:
        return self.facts.model_config

    @property
    def session_len(self) -> int:
        return self.facts.session_len

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def max_batch_size(self) -> int:
        return self.facts.max_batch_size

    @property
    def startup(self) -> Startup:
        return self.facts.startup
