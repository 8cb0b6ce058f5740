"""Trying what a grammar costs, in a process that may die of it. `trials.py` starts that process and asks it.

The compiler is another's, and what it does with a grammar that nobody foresaw cannot be known: it may take
minutes, all of the memory, or overflow its stack. Then a limit of the operating system ends this process.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.vocabulary import Vocabulary, tables
from lmdeploy_jax.logs import shortened

CPU_SECONDS = 3.0  # for one grammar, however busy the machine is
WALL_SECONDS = 60.0  # after which a trial counts as hung
MEMORY = 512 * 2**20  # bytes, for one grammar
_STACK = 4 * 2**20  # half the stack of a thread that compiles for answers: what passes here passes there
_WALKS, _STEPS = 3, 20  # beginnings of answers, and their tokens
_LONGEST = 1000  # characters of a fault: some repeat the grammar
_NICE = 10  # a lower priority than that of the processes that make answers
# As many optional properties as `limits` allows are as many alternatives, twice; a large multipleOf within a
# range takes several times the default's fuel. The rest are the defaults.
_DEAD_END, _NO_TEXT = "NoExtension", "no text fits it"
PARSER_LIMITS = LLParserLimits(
    verbose_errors=False, max_items_in_row=10_000, step_max_items=100_000, step_lexer_fuel=1_000_000
)


class Verdict(NamedTuple):
    """What came of a trial. `fault`: why the grammar cannot be used; `size`: the bytes that it takes.

    died: whether it ended the process, so that its parts are not worth another.
    """

    fault: str | None
    warnings: list[str]
    size: int = 0
    died: bool = False


def main(number: int, memory: int) -> None:
    """Answers on the connection with this file number until it ends: a vocabulary comes, then texts.

    memory: bytes for a grammar.
    """
    with Connection(number) as connection:
        os.nice(_NICE)
        connection.send_bytes(b"ready")
        vocabulary = pickle.loads(connection.recv_bytes())
        known = _tables(vocabulary)
        _limit_memory(memory)
        while True:
            try:
                text = connection.recv_bytes().decode()
            except EOFError:
                return
            connection.send_bytes(json.dumps(_judged(known, text)).encode())


def _tables(vocabulary: Vocabulary) -> LLTokenizer | RequestError:
    try:
        return tables(vocabulary)
    except RequestError as error:
        return error


def _limit_memory(room: int) -> None:
    used = _memory("data")
    if used:
        resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))


def _memory(kind: str) -> int:
    """Bytes; 0 on systems that do not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(pages[{"resident": 1, "data": 5}[kind]]) * resource.getpagesize()


def _judged(known: LLTokenizer | RequestError, text: str) -> Verdict:
    if isinstance(known, RequestError):
        return Verdict(str(known), [])
    verdicts: list[Verdict] = []
    threading.stack_size(_STACK)
    thread = threading.Thread(target=lambda: verdicts.append(_caught(known, text)))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # ends the process, as does the next
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return verdicts[0]


def _caught(known: LLTokenizer, text: str) -> Verdict:
    try:
        return _tried(known, text)
    except BaseException as error:  # panics of the library are no Exception
        return Verdict(f"{type(error).__name__}: {error}", [])


def _tried(known: LLTokenizer, text: str) -> Verdict:
    before = _memory("resident")
    start = LLMatcher(known, text, log_level=0, limits=PARSER_LIMITS)
    if start.is_error():
        return Verdict(shortened(start.get_error().strip(), _LONGEST), [])
    for seed in range(_WALKS):
        fault = _walked(start.deep_copy(), random.Random(seed).randrange)
        if fault is not None:
            return Verdict(fault, [])
    return Verdict(None, start.get_grammar_warnings(), max(0, _memory("resident") - before))


def _walked(matcher: LLMatcher, draw: Callable[[int], int]) -> str | None:
    """What is wrong with the beginning of an answer whose tokens are drawn."""
    for step in range(_STEPS):
        mask = matcher.compute_bitmask()
        if matcher.is_stopped() and not matcher.is_error():
            return None if step or matcher.is_accepting() else _NO_TEXT
        if matcher.is_error() or not matcher.consume_token(_drawn(mask, draw)):
            fault = matcher.get_error().strip().splitlines()[0]
            return (
                _NO_TEXT if _DEAD_END in fault and not step else f"it cannot be followed to an end: {fault}"
            )
    return None


def _drawn(mask: bytes, draw: Callable[[int], int]) -> int:
    """A token that the mask allows, and not the end where there is another."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").nonzero()[0]
    return int(bits[draw(max(1, len(bits) - 1))])
