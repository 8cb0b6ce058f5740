"""Stop strings: whatever the pieces, the same answer as looking at the text after every character."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_jax.text.stop import StopMatcher, _Automaton

LETTERS = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: the first place where the text so far ends with a stop string; the longest one."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            stop = max(endings, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def stream(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops, include), ""
    for piece in pieces:
        new, stop = matcher.feed(piece)
        shown += new
        if stop is not None:
            return shown, stop
    return shown + matcher.finish(), None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(LETTERS, STOPS, st.booleans(), st.lists(st.integers(0, 24), max_size=8))
def test_any_split_equals_the_whole(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert stream(pieces, stops, include) == reference(text, stops, include)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LETTERS, STOPS)
def test_only_possible_beginnings_are_held_back(text: str, stops: list[str]) -> None:
    matcher, shown = StopMatcher(stops), ""
    for end, char in enumerate(text, 1):
        new, stop = matcher.feed(char)
        shown += new
        if stop is not None:
            return
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) for stop in stops)
        starts = [
            n for n in range(len(held) + 1, end + 1) if any(s.startswith(text[end - n : end]) for s in stops)
        ]
        assert not starts, "a longer beginning of a stop string has leaked"


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("some text E") == ("some text ", None)
    assert matcher.feed("NDmore") == ("", "END")
    assert matcher.feed("more") == ("", None)
    assert matcher.finish() == ""


def test_include_stop_keeps_the_string_and_not_what_follows() -> None:
    assert StopMatcher(["\n\n"], include_stop=True).feed("a\n\nb") == ("a\n\n", "\n\n")


def test_what_is_kept_of_stop_strings_is_bounded() -> None:
    for i in range(30):
        StopMatcher(["a" * 8192 + str(i)])
        StopMatcher([f"short {i}"])
    kept = [found for found in gc.get_objects() if type(found) is _Automaton]
    assert sum(len(automaton.next) for automaton in kept) < 64 * 257 + 9 * 8200


def test_without_stop_strings_text_passes() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("abc") == ("abc", None)
    assert matcher.finish() == ""


@pytest.mark.parametrize("stops", ["END", ["a", ""]])
def test_bad_stop_strings_are_refused(stops: list[str]) -> None:
    with pytest.raises(ValueError, match="stop_strings"):
        StopMatcher(stops)
