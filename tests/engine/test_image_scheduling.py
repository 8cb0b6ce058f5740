"""Images beside running sequences, against an encoder that exists only as a table of rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from lmdeploy_jax.cache.encoder_cache import EncoderCacheManager, ViewKey
from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.engine.core.scheduler import DrainFirst, Scheduler
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.prompt import EncodedPrompt, Span, SpanImage
from tests.engine.test_scheduler import FULL, SESSION, read, request, run

VIEW = 16  # rows of a view
LEARNED = 2


def image(
    views: int, *, order: Sequence[int] | None = None, size: int = VIEW, apart: bool = False
) -> SpanImage:
    """An image whose tokens have its rows in `order`, -1 and -2 being the model's own. apart: there is text
    between the views.
    """
    rows = np.array(range(views * size) if order is None else order, np.int32)
    places = np.arange(len(rows), dtype=np.int32) + apart * (rows // size)
    return SpanImage(np.zeros((views, 1, 1), np.uint8), (1, 1), rows, places, size)


def prompt(*pieces: int | tuple[bytes, SpanImage]) -> EncodedPrompt:
    """Numbers of text tokens, and images with their content."""
    spans, images, length = [], [], 0
    for piece in pieces:
        if isinstance(piece, tuple):
            spans.append(Span(length, int(piece[1].places[-1]) + 1, piece[0]))
            images.append(piece[1])
        length += piece if isinstance(piece, int) else int(piece[1].places[-1]) + 1
    return EncodedPrompt(range(length), tuple(spans), images=tuple(images))


def make(
    capacity=64 * VIEW, pages=400, batch=32, tokens=512, most=None, enabled=False, bidirectional=False
) -> Scheduler:
    images = EncoderCacheManager(
        capacity,
        run_size=13,
        joining_size=4,
        max_batch_size=most,
        learned=LEARNED,
        bidirectional=bidirectional,
    )
    sizes = {"max_batch_size": batch, "max_tokens": tokens, "session_len": SESSION}
    return Scheduler(CacheManager(pages, FULL, enabled=enabled), encoder_cache=images, **sizes)


class Rows:
    """The device's array of rows: the content and the number of the row that stands at each place."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.capacity = scheduler.encoder_cache.capacity
        self.places = {self.capacity - 1 - i: (b"", -1 - i) for i in range(LEARNED)}
        self.bidirectional = scheduler.encoder_cache._bidirectional
        self.content: dict[int, bytes] = {}  # by the identity of the image

    def know(self, asked: Request) -> None:
        for span, each in zip(asked.prompt.spans, asked.prompt.images, strict=True):
            self.content[id(each)] = span.content_hash

    def run(self, step: Step) -> None:
        """Writes what is encoded before the step, and checks every row that its tokens read."""
        for each in [view for encoded in step.encoder_runs for view in encoded.views]:
            assert (each.rows // VIEW == each.number).all()
            for row, place in zip(each.rows.tolist(), each.places.tolist(), strict=True):
                assert place < self.capacity - LEARNED
                self.places[place] = self.content[id(each.image)], row
        wanted = [row for chunk in step.chunks for row in self._wanted(chunk)]
        if self.bidirectional:
            self._check_lookahead(step)
        index = [-1] * len(wanted) if step.embedding_index is None else step.embedding_index.tolist()
        for expected, place in zip(wanted, index, strict=True):
            assert (place == -1) == (expected is None)
            assert expected is None or self.places[place] == expected

    def _check_lookahead(self, step: Step) -> None:
        """Each token of an image sees as far as the last of its row of such tokens, which the step has."""
        expected = []
        for chunk in step.chunks:
            asked = chunk.sequence.request.prompt
            spans = zip(asked.spans, asked.images, strict=True)
            rows = {place + span.start for span, each in spans for place in each.places.tolist()}
            for position in range(chunk.start, chunk.start + chunk.count):
                end = position
                while end in rows and end + 1 in rows:
                    end += 1
                assert end < chunk.start + chunk.count, "a view was cut"
                expected.append(end - position)
        assert step.decode_only or step.lookahead.tolist() == expected

    def _wanted(self, chunk) -> list[tuple[bytes, int] | None]:
        found: list[tuple[bytes, int] | None] = [None] * chunk.count
        asked = chunk.sequence.request.prompt
        for span, each in zip(asked.spans, asked.images, strict=True):
            for place, row in zip((each.places + span.start).tolist(), each.rows.tolist(), strict=True):
                if chunk.start <= place < chunk.start + chunk.count:
                    found[place - chunk.start] = (b"" if row < 0 else span.content_hash), row
        return found


def sizes(step: Step) -> list[int]:
    """Of the runs that go before a step."""
    return [encoded.size for encoded in step.encoder_runs]


def decoding(count: int, **settings) -> Scheduler:
    """A scheduler whose `count` sequences all decode, and somebody reads along."""
    scheduler = make(**settings)
    for _ in range(count):
        scheduler.add(request(2, new=400))
    read(scheduler, scheduler.schedule())
    return scheduler


def test_a_burst_of_images_leaves_every_step_its_decoding_and_one_small_run():
    scheduler = decoding(8, batch=64, tokens=8192)
    several = [scheduler.add(request(prompt(5, (bytes([i]), image(13)), 5), new=1)) for i in range(24)]
    text = scheduler.add(request(20, new=1))
    runs = []
    while scheduler.waiting or any(s.remaining > 1 for s in scheduler.running):
        step = scheduler.schedule()
        assert sum(chunk.from_device for chunk in step.chunks) == 8
        assert len(sizes(step)) <= 1
        runs += sizes(step)
        read(scheduler, step)
        if not text.finished:
            assert not any(sequence.finished for sequence in several), "text waited for images"
    assert max(runs) == 4
    assert sum(runs) == 24 * 13


def test_a_last_token_that_is_an_images_waits_for_its_row_too():
    """One token is left of a prompt that ends with its image, whose rows others would take the place of."""
    scheduler = make(capacity=2 * VIEW + LEARNED, tokens=64)
    rows, others = Rows(scheduler), (request(prompt((name, image(1)), 10), new=1) for name in (b"b", b"c"))
    for asked in (request(prompt(65 - VIEW, (b"a", image(1))), new=1), *others):
        rows.know(asked)
        scheduler.add(asked)
    steps = run(scheduler)
    assert [chunk.count for step in steps for chunk in step.chunks][:2] == [64, 1]
    for step in steps:
        rows.run(step)


def test_what_is_not_encoded_yet_holds_no_other_prompt():
    scheduler = decoding(2)
    first = scheduler.add(request(prompt((b"a", image(4)), 3)))
    second = scheduler.add(request(prompt(7, (b"b", image(4)), 3)))
    text = scheduler.add(request(9))
    step = scheduler.schedule()
    assert [(c.sequence, c.count) for c in step.chunks[2:]] == [(first, 67), (second, 7), (text, 9)]
    assert sizes(step) == [4]
    read(scheduler, step)
    step = scheduler.schedule()
    assert [(c.sequence, c.start, c.count) for c in step.chunks if c.count > 1] == [(second, 7, 67)]


def test_a_chunk_waits_only_for_the_views_that_it_reads():
    scheduler = decoding(1, tokens=40)
    scheduler.add(request(prompt(10, (b"a", image(6)), 3)))
    steps = [scheduler.schedule() for _ in range(5)]
    assert [step.chunks[-1].count for step in steps] == [23, 23, 31, 31, 1]
    assert [[view.number for each in step.encoder_runs for view in each.views] for step in steps] == [
        [0, 1],
        [2, 3],
        [4],
        [5],
        [],
    ]


def test_what_is_encoded_takes_of_the_budget_where_somebody_reads_along():
    """A view that takes all of it is encoded beside the next tokens, and read in the step after."""
    scheduler = decoding(1, tokens=40)
    scheduler.add(request(prompt((b"a", image(1, size=160)), 3)))
    steps = [scheduler.schedule() for _ in range(2)]
    assert [(step.decode_only, len(step.encoder_runs)) for step in steps] == [(True, 1), (False, 0)]
    scheduler = decoding(1, tokens=40)
    scheduler.running[0].request.streams = False
    scheduler.add(request(prompt((b"a", image(1, size=160)), 3)))
    assert [chunk.count for chunk in scheduler.schedule().chunks] == [1, 39]


def test_images_that_nobody_reads_along_are_encoded_in_full_runs():
    scheduler = decoding(2)
    for sequence in scheduler.running:
        sequence.request.streams = False
    for i in range(5):
        scheduler.add(request(prompt((bytes([i]), image(5)))))
    assert sizes(scheduler.schedule()) == [13, 12]


def test_a_run_takes_views_of_no_more_images_than_it_may():
    scheduler = make(most=2)
    for i in range(5):
        scheduler.add(request(prompt((bytes([i]), image(2)))))
    assert sizes(scheduler.schedule()) == [4, 4, 2]


def test_no_step_cuts_a_view_that_attends_both_ways():
    """The budget beside answers that are read along gives way for the first one of a step."""
    scheduler = decoding(2, tokens=VIEW + 14, bidirectional=True)
    scheduler.add(request(prompt(20, (b"a", image(1)), 3, (b"b", image(1)), 3)))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [(step.chunks[-1].start, step.chunks[-1].count) for step in steps] == [(0, 20), (20, 19), (39, 19)]
    assert steps[1].lookahead.tolist() == [0, 0, *range(VIEW - 1, -1, -1), 0, 0, 0]
    scheduler = decoding(120, batch=130, tokens=600, bidirectional=True)
    scheduler.add(request(prompt((b"a", image(1, size=300)), 3)))
    assert scheduler.schedule().chunks[-1].count == 300, "beyond the budget of 256"


@pytest.mark.parametrize("needed", ["old", "new"])
def test_rows_that_a_running_sequence_needs_are_the_last_to_make_room(needed):
    cache = EncoderCacheManager(2 * VIEW, run_size=4, joining_size=1)

    def encoded(name: str) -> int:
        cache.begin_step(joining=False, needed=lambda: {ViewKey(needed.encode(), 0)})
        assert cache.reach(prompt((name.encode(), image(1))), 0, VIEW, VIEW) == VIEW
        return len(cache.take_runs())

    assert [encoded(name) for name in ("old", "new", "old", "new", "third", needed)] == [1, 1, 0, 0, 1, 0]


def test_an_image_that_is_held_is_counted_as_a_hit():
    scheduler = make()
    for name in (b"a", b"b", b"a"):
        scheduler.add(request(prompt((name, image(2)), 3), new=1))
        run(scheduler)
    assert (scheduler.encoder_cache.queries, scheduler.encoder_cache.hits) == (3, 1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_load_reads_the_rows_of_its_images(seed, bidirectional):
    """However few rows are held, down to one view's; prompts come, share images, give way and are aborted."""
    rnd = random.Random(seed)
    views = rnd.choice([1, 2, 5, 40])
    scheduler = make(
        capacity=views * VIEW + LEARNED,
        pages=rnd.choice([14, 60]),
        batch=rnd.choice([1, 3, 8]),
        tokens=rnd.choice([VIEW + 8, 70] if bidirectional else [8, 70]),
        bidirectional=bidirectional,
        most=rnd.choice([None, 1]),
        enabled=rnd.random() < 0.7,
    )
    interleaved = [row + view * VIEW for row in range(VIEW) for view in range(3)] + [-1, 0, -2]
    known = [image(1), image(4), image(3, order=interleaved), image(2, order=[-1, *range(20, 32)])]
    if bidirectional:
        known = [image(views, apart=True) for views in (1, 2, 3, 4)]
    rows, flight, live = Rows(scheduler), [], []
    for turn in range(500):
        if rnd.random() < 0.15 and turn < 350:
            chosen = [rnd.randrange(4) for _ in range(rnd.randrange(4))]
            pieces = [piece for i in chosen for piece in (rnd.randrange(1, 9), (bytes([i]), known[i]))]
            asked = request(prompt(*pieces, 1), new=rnd.randrange(1, 60))
            asked.streams = rnd.random() < 0.5
            rows.know(asked)
            live.append(scheduler.add(asked))
        if rnd.random() < 0.04 and live:
            sequence = live.pop(rnd.randrange(len(live)))
            if not sequence.finished:
                scheduler.finish(sequence)
        try:
            step = scheduler.schedule()
        except DrainFirst:
            while flight:
                read(scheduler, flight.pop(0))
            continue
        if step:
            rows.run(step)
            flight.append(step)
        if flight and (step is None or len(flight) > 1):
            read(scheduler, flight.pop(0))
        scheduler.check_integrity()
    for step in flight:
        read(scheduler, step)
    for step in run(scheduler):
        rows.run(step)
    assert scheduler.cache.pool.used == 0
    assert not scheduler.running


def test_a_view_that_finds_no_room_leaves_no_run_behind() -> None:
    images = EncoderCacheManager(VIEW, run_size=1, joining_size=1)
    asked = prompt((b"one", image(2)))
    assert images.reach(asked, 0, 2 * VIEW, 2 * VIEW) == VIEW
    assert [len(run.views) for run in images.take_runs()] == [1]
