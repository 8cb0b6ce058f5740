"""Stop strings, matched on text: any length, across token boundaries, held back and never leaked."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache


class StopMatcher:
    """Finds the first stop string in a stream of text.

    The stop string that is complete first wins, as when the text is looked at after every character; if two
    end at the same place, the longer one. So the result does not depend on how the text is cut into pieces,
    and a match never waits for more text. What may turn out to be the beginning of a stop string is held
    back.

    stop_strings: none of them empty; raises `ValueError` otherwise.
    include_stop: whether the matched string itself belongs to the text that is returned.
    """

    def __init__(self, stop_strings: Sequence[str], include_stop: bool = False) -> None:
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(f"stop_strings={stop_strings!r} must be a list of strings that are not empty.")
        self._automaton = _automaton(tuple(stop_strings))
        self._include = include_stop
        self._state = 0
        self._held = ""
        self._done = False

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes new text; returns what may be shown now, and the stop string once one has matched.

        After a match, everything else that is fed in is dropped.
        """
        if self._done:
            return "", None
        if not self._state and self._automaton.cannot_start_in(text):
            return text, None
        state, end, stop = self._automaton.scan(self._state, text)
        seen = self._held + text[:end]
        if stop is not None:
            self._done, self._held = True, ""
            return seen if self._include else seen[: len(seen) - len(stop)], stop
        shown = len(seen) - self._automaton.depth[state]
        self._state, self._held = state, seen[shown:]
        return seen[:shown], None

    def finish(self) -> str:
        """The text held back, when the generation has ended for another reason."""
        held, self._held, self._done = self._held, "", True
        return held


@dataclass
class _Automaton:
    """Aho and Corasick's (1975): states are prefixes of the stop strings, state 0 is the empty one.

    A state is the longest prefix that the text so far ends with, so that its depth is what must be held back.
    """

    next: list[dict[str, int]] = field(default_factory=lambda: [{}])
    fail: list[int] = field(default_factory=lambda: [0])
    depth: list[int] = field(default_factory=lambda: [0])
    stop: list[str | None] = field(
        default_factory=lambda: [None]
    )  # longest stop string that ends in this state

    def cannot_start_in(self, text: str) -> bool:
        """Whether the text has no stop string's first character: most text, told at C speed."""
        return self.next[0].keys().isdisjoint(text)

    def scan(self, state: int, text: str) -> tuple[int, int, str | None]:
        """The state after `text`, the number of characters read, the stop string that ended the reading."""
        for i, char in enumerate(text):
            state = self._step(state, char)
            if self.stop[state] is not None:
                return state, i + 1, self.stop[state]
        return state, len(text), None

    def _step(self, state: int, char: str) -> int:
        while state and char not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(char, 0)

    def add(self, stop: str) -> None:
        state = 0
        for char in stop:
            state = self.next[state].get(char) or self._grow(state, char)
        self.stop[state] = stop

    def _grow(self, parent: int, char: str) -> int:
        child = self.next[parent][char] = len(self.next)
        self.next.append({})
        self.fail.append(0)
        self.depth.append(self.depth[parent] + 1)
        self.stop.append(None)
        return child

    def link(self) -> None:
        """Sets each state's fallback, breadth first: the longest proper suffix that is a state too."""
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.next[state].items():
                self.fail[child] = self._step(self.fail[state], char)
                queue.append(child)
            if self.stop[state] is None:
                self.stop[state] = self.stop[self.fail[state]]


def _automaton(stops: tuple[str, ...]) -> _Automaton:
    """Kept for the other answers of the request, and for the next one: at most 25 MB in all."""
    return (_long if sum(map(len, stops)) > _LONG else _short)(stops)


def _built(stops: tuple[str, ...]) -> _Automaton:
    automaton = _Automaton()
    for stop in stops:
        automaton.add(stop)
    automaton.link()
    return automaton


# An automaton takes 250 to 300 bytes a character of its stop strings. Those of long lists, up to 2 MB each,
# have a smaller cache.
_LONG = 256
_short, _long = lru_cache(maxsize=64)(_built), lru_cache(maxsize=8)(_built)
