"""Compiled grammars, kept by their text."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.matcher import THREADS, Matcher
from lmdeploy_jax.guided.response_format import BEST_EFFORT, grammar_text
from lmdeploy_jax.guided.vocabulary import tables
from lmdeploy_jax.text.tokenizer import Tokenizer

logger = logging.getLogger("lmdeploy_jax")
KEPT = 256  # compiled grammars
LEXERS = 2 * THREADS if THREADS > 1 else 1  # of a grammar
_NOT_ENFORCEABLE = ("Unimplemented keys", "Unknown format", "oneOf constraints are not supported")
_REMEDY = (
    "(Leave it out, or ask for what can be enforced with "
    f'"x-guidance": {json.dumps(BEST_EFFORT)} at the top of the schema.)'
)
_LIMITS = LLParserLimits(verbose_errors=False)


class Grammar:
    """A compiled grammar, to be followed by any number of sequences; `text` and `kind` compile to it anew.

    Copies of one matcher share its lexer and wait for each other there, so that threads that fill their masks
    together are slower than one. Hence several, one more with each request until there are LEXERS.
    """

    def __init__(self, start: LLMatcher, vocab_size: int, text: str, kind: str) -> None:
        self.text = text
        self.kind = kind
        self._starts = [start]
        self._turns = itertools.count()
        self._vocab_size = vocab_size

    def matcher(self, stop_ids: Iterable[int]) -> Matcher:
        """A sequence's own way through the grammar, at its beginning."""
        start = self._starts[next(self._turns) % len(self._starts)]
        return Matcher(start.deep_copy(), self._vocab_size, stop_ids)

    def grow(self, vocabulary: LLTokenizer) -> None:
        """Compile it once more, for a lexer more."""
        if len(self._starts) < LEXERS:
            self._starts.append(LLMatcher(vocabulary, self.text, log_level=0, limits=_LIMITS))


class Grammars:
    """The grammars of one model's requests. Compiling happens on the caller's thread; any thread may call.

    The first call reads the whole vocabulary, which takes up to a second. The last `KEPT` grammars are kept.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, response_format: Mapping[str, Any] | None) -> Grammar | None:
        """The grammar of a response format; None where any text will do.

        Raises `RequestError` for an unknown type, and for a schema, expression or grammar that is wrong or
        uses what llguidance does not know.
        """
        text = grammar_text(response_format)
        if response_format is None or text is None:
            return None
        return self.compile_text(text, response_format["type"])

    def compile_text(self, text: str, kind: str) -> Grammar:
        """The grammar that `grammar_text` wrote for a response format of this kind. Raises `RequestError`."""
        with self._lock:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
            vocabulary = self._tables
        if found is not None:
            found.grow(vocabulary)
            return found
        grammar = Grammar(_compiled(vocabulary, text, kind), self._vocab_size, text, kind)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar

    @cached_property
    def _tables(self) -> LLTokenizer:
        return tables(self._tokenizer, self._vocab_size)


def _compiled(vocabulary: LLTokenizer, text: str, kind: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary, text, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        fault = matcher.get_error().strip()
        remedy = f" {_REMEDY}" if any(mark in fault for mark in _NOT_ENFORCEABLE) else ""
        raise RequestError(f"response_format of type {kind!r} cannot be used: {fault}{remedy}")
    for warning in matcher.get_grammar_warnings():
        logger.warning("a grammar is enforced in part only: %s", warning)
    return matcher
