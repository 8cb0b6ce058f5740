"""Grammars of one model's requests: written, tried, compiled and kept."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLTokenizer

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.lru import LruCache
from lmdeploy_jax.guided.matcher import THREADS, Matcher
from lmdeploy_jax.guided.panics import panics_are_errors
from lmdeploy_jax.guided.response_format import BEST_EFFORT, described, grammar_text, parts_of
from lmdeploy_jax.guided.trial import PARSER_LIMITS
from lmdeploy_jax.guided.trials import Trials
from lmdeploy_jax.guided.vocabulary import Vocabulary, tables
from lmdeploy_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lmdeploy_jax")
SOURCE_CACHE_BYTES, GRAMMAR_CACHE_BYTES = 32 * 2**20, 256 * 2**20
LEXERS = 2 * THREADS if THREADS > 1 else 1  # most lexers of one grammar
# Bytes that are counted for a grammar whose trial needed no more memory than its process had already, and for
# what a lexer caches with each token of an answer (2 to 24 KB measured).
_LEAST, _PER_TOKEN = 256 * 1024, 8 * 1024
_NOT_ENFORCEABLE = ("Unimplemented keys", "Unknown format", "oneOf constraints are not supported")
_REMEDY = (
    "(Leave it out, or ask for what can be enforced with "
    f'"x-guidance": {json.dumps(BEST_EFFORT)} at the top of the schema.)'
)


class Source(NamedTuple):
    """A grammar's text that has been tried. `size`: the bytes that it takes once compiled."""

    text: str
    size: int


class Grammar:
    """A grammar that any number of sequences may follow, once it is compiled.

    Copies of one matcher share its lexer and wait for each other there, so that threads that fill their masks
    together are slower than one. Hence several, one more with each request until there are LEXERS.
    """

    def __init__(self, source: Source, vocab_size: int) -> None:
        self.source = source
        self._starts: list[LLMatcher] = []
        self._turns = itertools.count()
        self._vocab_size = vocab_size
        self._advanced = itertools.count()
        self._tokens = 0

    @property
    def complete(self) -> bool:
        """Whether it has all of its lexers."""
        return len(self._starts) >= LEXERS

    @property
    def size(self) -> int:
        """Bytes, as estimated."""
        return max(self.source.size, _LEAST) * len(self._starts) + self._tokens * _PER_TOKEN

    def matcher(self, stop_ids: Iterable[int]) -> Matcher:
        """A sequence's own way through the grammar, at its beginning.

        Raises `RequestError` where llguidance panics.
        """
        start = self._starts[next(self._turns) % len(self._starts)]
        with panics_are_errors():
            return Matcher(start.deep_copy(), self._vocab_size, stop_ids, self._count)

    def compile(self, vocabulary: LLTokenizer) -> None:
        """Once more, for a lexer more. Raises `RequestError`."""
        if self.complete:
            return
        with panics_are_errors():
            start = LLMatcher(vocabulary, self.source.text, log_level=0, limits=PARSER_LIMITS)
        if start.is_error():
            raise RequestError(f"The answer's grammar cannot be compiled: {start.get_error().strip()}")
        self._starts.append(start)

    def _count(self) -> None:
        self._tokens = next(self._advanced)


class Grammars:
    """The grammars of one model's requests. Any thread may call.

    The first call reads the whole vocabulary, which takes up to a second, and starts a process.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._trials = Trials(lambda: self._vocabulary)
        self._pending: dict[str, Future[Source]] = {}
        self._sources: LruCache[Source] = LruCache(SOURCE_CACHE_BYTES, lambda source: 2 * len(source.text))
        self._grammars: LruCache[Grammar] = LruCache(GRAMMAR_CACHE_BYTES, lambda grammar: grammar.size)

    def compile(self, response_format: Mapping[str, Any] | None, *, here: bool = True) -> Grammar | None:
        """The grammar of a response format; None where any text will do. Compiles on the caller's thread.

        here: False leaves a grammar that has been tried and not compiled, for an engine in another process.

        Raises `RequestError` for an unknown type, and for a schema, expression or grammar that is wrong,
        costs too much or uses what llguidance does not know; `EngineError` where too many wait.
        """
        text = grammar_text(response_format)
        if response_format is None or text is None:
            return None
        source = self._tried_once(text, response_format)
        return self.compiled(source) if here else Grammar(source, self._vocab_size)

    def compiled(self, source: tuple[str, int]) -> Grammar:
        """The grammar of a `Source`, kept or compiled anew. Raises `RequestError` where it cannot be."""
        source = Source(*source)
        with self._lock:
            vocabulary = self._tables
            grammar = self._grammars.get(source.text) or Grammar(source, self._vocab_size)
            self._grammars.put(source.text, grammar)
        grammar.compile(vocabulary)
        with self._lock:
            self._grammars.put(source.text, grammar)  # again: the cache counts its size anew
        return grammar

    def has(self, text: str) -> bool:
        """Whether `compiled` would give a cached grammar that has all of its lexers."""
        with self._lock:
            grammar = self._grammars.get(text)
        return grammar is not None and grammar.complete

    def _tried_once(self, text: str, response_format: Mapping[str, Any]) -> Source:
        """Requests that come with the same grammar wait for one trial."""
        with self._lock:
            source, waiting = self._sources.get(text), self._pending.get(text)
            if source is None and waiting is None:
                future = self._pending[text] = Future()
        if source is not None:
            return source
        if waiting is not None:
            return waiting.result()
        try:
            future.set_result(self._tried(text, response_format))
        except BaseException as error:
            future.set_exception(error)
        with self._lock:
            del self._pending[text]
            if future.exception() is None:
                self._sources.put(text, future.result())
        return future.result()

    def _tried(self, text: str, response_format: Mapping[str, Any]) -> Source:
        verdict = self._trials.of(text)
        if verdict.fault is not None:
            name, fault = described(response_format), verdict.fault
            for part_name, part in {} if verdict.died else parts_of(response_format).items():
                own = self._trials.of(part).fault
                if own is not None:
                    name, fault = part_name, own
                    break
            remedy = f" {_REMEDY}" if any(mark in fault for mark in _NOT_ENFORCEABLE) else ""
            raise RequestError(f"{name} cannot be used: {fault}{remedy}")
        for warning in verdict.warnings:
            logger.warning("a grammar is enforced in part only: %s", warning)
        return Source(text, verdict.size)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._tokenizer, self._vocab_size)

    @cached_property
    def _tables(self) -> LLTokenizer:
        def encode(text: str) -> list[int]:
            return self._tokenizer.encode(text, add_bos=False, add_special_tokens=False)

        return tables(self._vocabulary, encode)
