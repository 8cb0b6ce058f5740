"""Which views of images the device holds rows of, where these stand, and what is to be encoded next.

The unit is a view: a large image is encoded in several runs, and a step waits only for the views whose rows
its tokens have. numpy and no JAX; `engine.core.encoder` runs the vision model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lmdeploy_jax.prompt import EncodedPrompt, SpanImage

ROWS_A_TOKEN = (
    2  # rows of a view that a token of a step's budget stands for: a tile of 256, half of a small step
)


class ViewKey(NamedTuple):
    """A view, by the content of its image and its number there."""

    content_hash: bytes
    number: int


class ViewRows(NamedTuple):
    """A view that is to be encoded: `rows` int32 [n] of its image, and where they will stand."""

    image: SpanImage
    number: int
    rows: np.ndarray
    places: np.ndarray


@dataclass
class EncoderRun:
    """Views that are encoded together."""

    views: list[ViewRows] = field(default_factory=list)
    size: int = 0  # as `SpanImage.view_size` counts
    images: set[bytes] = field(default_factory=set)  # by content


class Part(NamedTuple):
    """Tokens of an image among those of a chunk, counted from the chunk's start, and the rows they have."""

    content_hash: bytes
    image: SpanImage
    tokens: np.ndarray
    rows: np.ndarray

    def views(self) -> dict[ViewKey, int]:
        """Those that the rows are of, with the first of the tokens that has one of each."""
        numbers = self.rows[self.rows >= 0] // self.image.view_rows
        tokens = self.tokens[self.rows >= 0]
        found, first = np.unique(numbers, return_index=True)
        order = np.argsort(first)
        return {
            ViewKey(self.content_hash, int(number)): int(tokens[at])
            for number, at in zip(found[order], first[order], strict=True)
        }


def parts(prompt: EncodedPrompt, start: int, stop: int) -> Iterator[Part]:
    """What images are to tokens `start .. stop` of a prompt."""
    for span, image in zip(prompt.spans, prompt.images, strict=True):
        if span.start < stop and start < span.stop:
            low, high = np.searchsorted(image.places, (start - span.start, stop - span.start))
            tokens = image.places[low:high] + (span.start - start)
            yield Part(span.content_hash, image, tokens, image.rows[low:high])


def views_ahead(prompt: EncodedPrompt, start: int) -> Iterator[ViewKey]:
    """The views that tokens from `start` on have rows of."""
    return (key for part in parts(prompt, start, len(prompt)) for key in part.views())


def rows_of(image: SpanImage, number: int) -> np.ndarray:
    """The rows of a view that some token has, rising: int32."""
    return np.unique(image.rows[image.rows // image.view_rows == number])


def _blocks(prompt: EncodedPrompt, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Tokens in a row that have rows of images, first and last but one: those of which `start .. stop` has
    some.
    """
    for span, image in zip(prompt.spans, prompt.images, strict=True):
        if span.start < stop and start < span.stop:
            gaps = np.flatnonzero(np.diff(image.places) > 1)
            firsts, lasts = image.places[np.append(0, gaps + 1)], image.places[np.append(gaps, -1)]
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                if span.start + first < stop and start <= span.start + last:
                    yield span.start + first, span.start + last + 1


def _uncut(prompt: EncodedPrompt, start: int, stop: int, most: int) -> int:
    """Where tokens `start .. stop` end so that no block is cut: before the last one, or after it where there
    is nothing before it and `most` allows.
    """
    for first, end in _blocks(prompt, stop - 1, stop):
        if end > stop:
            return first if first > start else end if end <= most else start
    return stop


class EncoderCacheManager:
    """Rows of views, the longest unused of which make room for others; those that a step reads stay for it.

    capacity: rows that are held, the last `learned` of which are the vision model's own and always there.
    run_size: of the largest run; joining_size: of one beside answers that somebody reads along, whose next
    tokens wait for it. max_batch_size: images of a run (None: as many as fit). bidirectional: tokens of a
    view, which stand in a row apart from others', attend to each other both ways: one step computes all.
    """

    def __init__(
        self,
        capacity: int,
        *,
        run_size: int,
        joining_size: int,
        max_batch_size: int | None = None,
        learned: int = 0,
        bidirectional: bool = False,
    ) -> None:
        self.capacity, self._learned, self._bidirectional = capacity, learned, bidirectional
        self._run_size, self._joining_size, self._max_images = run_size, joining_size, max_batch_size
        self.queries = self.hits = 0  # images that prompts had to read, and those of them that were held
        self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self._held: OrderedDict[ViewKey, np.ndarray] = OrderedDict()  # the longest unused first
        self._free = list(range(self.capacity - self._learned))
        self._runs: list[EncoderRun] = []
        self._read: set[ViewKey] = set()
        self.begin_step(joining=False, needed=set)

    # -- planning a step ----------------------------------------------------------------------------------

    def begin_step(self, *, joining: bool, needed: Callable[[], Set[ViewKey]]) -> None:
        """joining: there are next tokens in the step that somebody waits for, and so one run at most, a small
        one. needed: the views that running sequences have yet to read, which make room last.
        """
        self._joining, self._needed = joining, needed

    def note_query(self, prompt: EncodedPrompt, start: int) -> None:
        """Count the images that a prompt reads which is going to be computed from token `start` on."""
        for part in parts(prompt, start, len(prompt)):
            self.queries += 1
            self.hits += self._held.keys() >= part.views().keys()

    def plan(self, prompt: EncodedPrompt, start: int, count: int, budget: int, spare: int) -> tuple[int, int]:
        """How many of `count` tokens from `start` on the step can compute, and what of its budget runs take
        that give them their rows. spare: tokens beyond the budget, for what must not be cut.
        """
        before = self._cost()
        reached = self.reach(prompt, start, start + count, start + budget + spare) - start
        cost = self._cost() - before
        return min(reached, max(budget - cost, 0)) if cost else reached, cost

    def _cost(self) -> int:
        """What the runs take of the budget of a step that somebody waits for. Views that no step cuts take
        nothing: they would find no room beside their own rows.
        """
        if not self._joining or self._bidirectional:
            return 0
        return sum(len(view.rows) for run in self._runs for view in run.views) // ROWS_A_TOKEN

    def reach(self, prompt: EncodedPrompt, start: int, stop: int, most: int) -> int:
        """Up to where the step can compute tokens `start .. stop`: the first that has a row of a view which
        is not held and can't be encoded before it. Where a view must not be cut, it is `most` that counts for
        the first one.
        """
        if self._bidirectional:
            stop = _uncut(prompt, start, stop, most)
        for part in parts(prompt, start, stop):
            for key, token in part.views().items():
                if not self._will_hold(key, part.image):
                    return start + token
        return stop

    def take_runs(self) -> list[EncoderRun]:
        """What must be encoded before the step, whose plan is complete."""
        runs, self._runs, self._read = self._runs, [], set()
        return [run for run in runs if run.views]  # one was begun for a view that found no room

    def _will_hold(self, key: ViewKey, image: SpanImage) -> bool:
        """Whether the step can read a view, which is encoded before it where it must be."""
        if key not in self._held:
            run, rows = self._run_for(key, image), rows_of(image, key.number)
            if run is None or not self._make_room(len(rows)):
                return False
            places, self._free = np.array(self._free[: len(rows)], np.int32), self._free[len(rows) :]
            self._held[key] = places
            run.views.append(ViewRows(image, key.number, rows, places))
            run.size += image.view_size
            run.images.add(key.content_hash)
        self._held.move_to_end(key)
        self._read.add(key)
        return True

    def _run_for(self, key: ViewKey, image: SpanImage) -> EncoderRun | None:
        """A run that a view can be part of. A view that is larger than a small run is one alone."""
        most = self._joining_size if self._joining else self._run_size
        if self._runs:
            run = self._runs[-1]
            images = len(run.images | {key.content_hash})
            if run.size + image.view_size <= most and images <= (self._max_images or images):
                return run
            if self._joining:
                return None
        self._runs.append(EncoderRun())
        return self._runs[-1]

    def _make_room(self, count: int) -> bool:
        """Free `count` rows, of views that nobody needs first; False where the step reads too many."""
        if count <= len(self._free):
            return True
        unread = [key for key in self._held if key not in self._read]
        if sum(len(self._held[key]) for key in unread) + len(self._free) < count:
            return False
        needed = self._needed()
        for key in sorted(unread, key=needed.__contains__):
            if count > len(self._free):
                self._free += self._held.pop(key).tolist()
        return True

    # -- what a planned step reads ------------------------------------------------------------------------

    def index(self, chunks: Iterable[tuple[EncodedPrompt, int, int]]) -> np.ndarray | None:
        """Where the row of each of a step's tokens stands, int32, -1: the token has its own embedding. None
        where all have. chunks: tokens `start .. stop` of each prompt, one chunk after the other.
        """
        offset, found = 0, []
        for prompt, start, stop in chunks:
            found += [(offset + part.tokens, self._places(part)) for part in parts(prompt, start, stop)]
            offset += stop - start
        index = np.full(offset, -1, np.int32)
        for tokens, places in found:
            index[tokens] = places
        return index if (index >= 0).any() else None

    def lookahead(self, chunks: Iterable[tuple[EncodedPrompt, int, int]]) -> np.ndarray | None:
        """How many tokens after it each of a step's tokens sees: int32, the rest of its view's; None for
        models whose tokens see none. Given what `index` is given.
        """
        if not self._bidirectional:
            return None
        ahead: list[np.ndarray] = []
        for prompt, start, stop in chunks:
            ahead.append(np.zeros(stop - start, np.int32))
            for first, end in _blocks(prompt, start, stop):
                first = max(first, start)
                ahead[-1][first - start : end - start] = np.arange(end - first)[::-1]
        return np.concatenate(ahead)

    def _places(self, part: Part) -> np.ndarray:
        places = self.capacity + part.rows  # as learned rows have it
        numbers = np.where(part.rows < 0, -1, part.rows // part.image.view_rows)
        for key in part.views():
            among = numbers == key.number
            at = np.searchsorted(rows_of(part.image, key.number), part.rows[among])
            places[among] = self._held[key][at]
        return places
