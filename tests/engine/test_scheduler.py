"""The scheduler alone, against a device that exists only as a set of computed positions."""

import random

import pytest

from lmdeploy_jax.cache import manager
from lmdeploy_jax.cache.layout import CacheGroup
from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.engine.core.scheduler import DrainFirst, Scheduler
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.engine.request import Request, SamplingParams, Sequence, Status
from lmdeploy_jax.prompt import EncodedPrompt

SESSION = 512
FULL = (CacheGroup(),)


def make(pages=40, batch=4, tokens=128, groups=FULL, **kw) -> Scheduler:
    cache = CacheManager(pages, groups, **kw)
    return Scheduler(cache, max_batch_size=batch, max_tokens=tokens, session_len=SESSION)


def request(prompt, new=8, **params) -> Request:
    prompt = list(range(prompt)) if isinstance(prompt, int) else prompt
    encoded = prompt if isinstance(prompt, EncodedPrompt) else EncodedPrompt(prompt)
    return Request(encoded, SamplingParams(max_new_tokens=new, **params), on_output=lambda out: None)


def held(sequence: Sequence, group: int = 0) -> list[int]:
    """Its pages in one cache group."""
    return sequence.pages.runs[group].pages


def read(scheduler: Scheduler, step: Step, token=7) -> None:
    """What the engine does with a step's results."""
    for sequence, _ in step.sampled * step.repeat:
        if sequence.finished:
            continue
        sequence.unread -= 1
        sequence.tokens.append(token)
        if len(sequence.tokens) - sequence.num_prompt >= sequence.params.max_new_tokens:
            scheduler.finish(sequence)


def run(scheduler: Scheduler, ahead=1) -> list[Step]:
    """Schedule until nothing is left, `ahead` steps before reading."""
    steps, flight = [], []
    for _ in range(10_000):
        if not scheduler.has_work:
            return steps
        try:
            step = scheduler.schedule()
        except DrainFirst:
            while flight:
                read(scheduler, flight.pop(0))
            continue
        if step:
            assert step.num_tokens <= scheduler.max_tokens
            steps.append(step)
            flight.append(step)
        if flight and (step is None or len(flight) > ahead):
            read(scheduler, flight.pop(0))
        scheduler.check_integrity()
    raise AssertionError("the scheduler makes no progress")


def test_a_long_prompt_is_computed_in_chunks_and_then_decoded():
    scheduler = make()
    scheduler.add(request(300, new=3))
    steps = run(scheduler)
    assert [s.num_tokens for s in steps] == [128, 128, 44, 1, 1]
    assert [s.decode_only for s in steps] == [False, False, False, True, True]
    assert [len(s.sampled) for s in steps] == [0, 0, 1, 1, 1]


def test_running_sequences_go_on_while_a_prompt_is_computed():
    scheduler = make()
    scheduler.add(request(10, new=50))
    read(scheduler, scheduler.schedule())
    scheduler.add(request(200, new=2))
    step = scheduler.schedule()
    assert [c.count for c in step.chunks] == [1, 127]
    assert not step.decode_only
    assert len(step.sampled) == 1


def test_a_page_is_found_only_once_its_last_token_is_computed():
    scheduler = make(pages=3)
    first = scheduler.add(request(PAGE_SIZE - 1))
    scheduler.add(request(list(range(100, 100 + PAGE_SIZE))))
    scheduler.schedule()
    first.unread -= 1  # as where Python must see each of its tokens, while the other is a step ahead
    first.tokens.append(7)
    with pytest.raises(DrainFirst):  # its last token is planned by then, and not computed
        scheduler.schedule()
    table, hashes, *_ = scheduler.cache.match(first.request.prompt, first.tokens, PAGE_SIZE, [])
    assert hashes == []
    assert list(table.pages) == []


def decoding(count: int, **settings) -> Scheduler:
    """A scheduler whose `count` sequences all decode."""
    scheduler = make(**{"pages": 4000, "batch": 256, "tokens": 2048} | settings)
    for _ in range(count):
        scheduler.add(request(2, new=400))
    read(scheduler, scheduler.schedule())
    return scheduler


@pytest.mark.parametrize(("count", "most"), [(1, 256), (100, 256), (130, 384), (200, 512)])
def test_few_prompts_join_in_steps_that_hold_nobody_up(count, most):
    scheduler = decoding(count, enabled=False)
    scheduler.add(request(450, new=1))
    scheduler.add(request(450, new=1))
    step = scheduler.schedule()
    assert step.num_tokens == most
    assert [chunk.count for chunk in step.chunks[:count]] == [1] * count


def steps_of_a_burst(scheduler: Scheduler) -> list[int]:
    """Sizes of the steps until twelve prompts that come at once are in."""
    for _ in range(12):
        scheduler.add(request(450, new=1))
    sizes = []
    while scheduler.waiting or any(s.remaining > 1 for s in scheduler.running):
        step = scheduler.schedule()
        sizes.append(step.num_tokens)
        read(scheduler, step)
    return sizes


def test_a_burst_goes_before_the_next_token_of_those_who_are_read_along():
    scheduler = decoding(10, enabled=False)
    sizes = steps_of_a_burst(scheduler)
    assert sizes == [2048, 2048, 12 * 450 - 4096]
    step = scheduler.schedule()
    assert step.decode_only
    assert len(step.chunks) == 10
    read(scheduler, step)
    scheduler.add(request(450, new=1))
    assert scheduler.schedule().num_tokens == 256


def test_a_pause_is_bounded(monkeypatch):
    monkeypatch.setattr("lmdeploy_jax.engine.core.scheduler.PAUSE_TOKENS", 4096)
    scheduler = decoding(10, enabled=False)
    for _ in range(20):
        scheduler.add(request(450, new=400))
    decoded = []
    for _ in range(5):
        step = scheduler.schedule()
        decoded.append(sum(chunk.from_device for chunk in step.chunks))
        read(scheduler, step)
    assert decoded[:2] == [0, 0]
    assert 10 <= decoded[2] < decoded[3] < decoded[4]


def test_prompts_that_get_no_slot_are_no_burst():
    scheduler = decoding(100, batch=101, enabled=False)
    for _ in range(20):
        scheduler.add(request(450, new=1))
    step = scheduler.schedule()
    assert sum(chunk.from_device for chunk in step.chunks) == 100


def test_those_who_decode_go_on_where_a_burst_finds_no_pages():
    scheduler = make(pages=40, batch=64, tokens=512, enabled=False)
    for _ in range(8):
        scheduler.add(request(250, new=10))
    for _ in range(40):
        scheduler.add(request(250, new=10))
    run(scheduler)
    assert not scheduler.has_work


def test_prompts_are_taken_in_at_full_speed_beside_answers_that_nobody_reads_along():
    scheduler = decoding(10, enabled=False)
    for sequence in scheduler.running:
        sequence.request.streams = False
    for _ in range(12):
        scheduler.add(request(450, new=1))
    step = scheduler.schedule()
    assert step.num_tokens == 2048
    assert sum(chunk.from_device for chunk in step.chunks) == 10


def test_prompts_join_however_many_decode():
    scheduler = decoding(700, batch=1000, enabled=False)
    scheduler.add(request(450, new=1))
    assert scheduler.schedule().num_tokens == 700 + 128


def test_a_token_is_drawn_before_the_last_one_is_read():
    scheduler = make()
    sequence = scheduler.add(request(10, new=4))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert second.chunks[0].from_device
    assert sequence.unread == 2
    assert second.chunks[0].start == 10
    read(scheduler, first)
    read(scheduler, second)
    assert sequence.tokens[10:] == [7, 7]


def test_nothing_is_drawn_beyond_the_wanted_length():
    scheduler = make()
    scheduler.add(request(10, new=1))
    step = scheduler.schedule()
    assert scheduler.schedule() is None
    read(scheduler, step)
    assert not scheduler.has_work


def test_a_second_request_shares_the_first_ones_pages():
    scheduler = make(tokens=256)
    scheduler.add(request(200))
    second = scheduler.add(request(200))
    step = scheduler.schedule()  # in the very same step
    assert [c.count for c in step.chunks] == [200, 200 - 3 * PAGE_SIZE]
    assert second.cached == 3 * PAGE_SIZE
    assert held(second)[:3] == held(step.chunks[0].sequence)[:3]
    read(scheduler, step)
    run(scheduler)


def test_a_fully_cached_prompt_still_computes_its_last_token():
    scheduler = make()
    scheduler.add(request(2 * PAGE_SIZE, new=1))
    run(scheduler)
    again = scheduler.add(request(2 * PAGE_SIZE, new=1))
    step = scheduler.schedule()
    assert step is not None
    assert again.cached == PAGE_SIZE
    assert step.num_tokens == PAGE_SIZE


def test_pages_of_a_prompt_that_no_token_came_of_are_overwritten_before_they_are_used_again():
    """They may hold NaN, of which only a token's logits would have told."""
    scheduler = make(pages=7, tokens=PAGE_SIZE)
    aborted = scheduler.add(request(5 * PAGE_SIZE))
    scheduler.schedule()
    first, *others = list(held(aborted))
    scheduler.finish(aborted)
    for pages, unclean in ((5, others), (6, [first])):  # the first is cached, and so taken last
        scheduler.add(request([pages] * pages * PAGE_SIZE, new=1))
        taken = [page for step in run(scheduler) for page in step.unclean]
        assert sorted(taken) == sorted(unclean)


def test_a_prompt_that_waits_for_pages_is_hashed_once(monkeypatch):
    scheduler, hashed, plain = make(pages=12), [], manager.next_hash
    scheduler.add(request(4 * PAGE_SIZE, new=1))
    run(scheduler)
    scheduler.add(request([9] * 7 * PAGE_SIZE, new=20))
    waiting = scheduler.add(request(6 * PAGE_SIZE))  # 4 pages are known, and no other is there
    monkeypatch.setattr(manager, "next_hash", lambda *args: hashed.append(args[1]) or plain(*args))
    for _ in range(10):
        read(scheduler, scheduler.schedule())
    assert waiting.status is Status.WAITING
    assert hashed.count(waiting.request.prompt) == 5
    run(scheduler)
    assert waiting.cached > 0


def test_generated_pages_are_cached_for_the_next_turn():
    scheduler = make()
    first = scheduler.add(request(60, new=100))
    run(scheduler)
    second = scheduler.add(request([*first.tokens, 1, 2, 3]))
    run(scheduler)
    assert second.cached == 2 * PAGE_SIZE


def test_n_sequences_share_the_prefill_and_copy_the_last_page():
    scheduler = make()
    first = scheduler.add(request(100, n=3))
    siblings = list(first.siblings)
    step = scheduler.schedule()
    assert step.num_tokens == 100
    assert [s for s, _ in step.sampled] == [first, *siblings]
    assert {row for _, row in step.sampled} == {0}
    assert [source for source, _ in step.copies] == [held(first)[1]] * 2
    assert len({held(s)[1] for s in (first, *siblings)}) == 3
    assert len({held(s)[0] for s in (first, *siblings)}) == 1
    read(scheduler, step)
    run(scheduler)
    assert scheduler.cache.pool.used == 0


def test_n_sequences_on_a_page_boundary_copy_nothing():
    scheduler = make()
    scheduler.add(request(2 * PAGE_SIZE, n=2))
    step = scheduler.schedule()
    assert step.copies == []


@pytest.mark.parametrize("started", [False, True])
def test_a_sibling_can_end_before_it_forks(started):
    scheduler = make(tokens=32)
    first = scheduler.add(request(100, n=3))
    gone, stays = first.siblings
    if started:
        scheduler.schedule()
    scheduler.finish(gone)
    scheduler.check_integrity()
    run(scheduler)
    assert gone.tokens == list(range(100))
    assert len(stays.tokens) == len(first.tokens) == 108
    assert scheduler.cache.pool.used == 0


def test_the_latest_sequence_gives_way_when_pages_run_out():
    scheduler = make(pages=7, batch=3, enabled=False)
    sequences = [scheduler.add(request([i] * 60, new=120)) for i in range(3)]
    run(scheduler)
    assert scheduler.preemptions > 0
    assert all(len(s.tokens) == 180 for s in sequences)
    assert scheduler.cache.pool.used == 0


def test_requests_start_in_order_of_arrival():
    scheduler = make(batch=2)
    order = [scheduler.add(request([i] * 10, new=5)) for i in range(5)]
    admitted: list[Sequence] = []
    for step in run(scheduler):
        admitted += step.admitted
    assert admitted == order


def test_a_sequence_that_python_must_see_waits_for_its_token():
    scheduler = make()
    scheduler.add(request(10, banned_sequences=((1, 2),)))
    step = scheduler.schedule()
    assert scheduler.schedule() is None
    read(scheduler, step)
    assert scheduler.schedule() is not None


def test_prompts_that_are_reported_on_are_computed_in_full():
    scheduler = make()
    scheduler.add(request(200))
    run(scheduler)
    again = scheduler.add(request(200, prompt_logprobs=1))
    run(scheduler)
    assert again.cached == 0


class Device:
    """The cache's content: what stands in each slot of each page is told by all tokens up to it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.groups = scheduler.cache.groups
        self.slots: dict[int, int] = {}

    def run(self, step: Step) -> None:
        """Writes all of a step's tokens, checks all that its queries read, then copies pages."""
        for ahead in range(step.repeat):
            parts = [(chunk.sequence, chunk.start + ahead, chunk.count) for chunk in step.chunks]
            self._pass([part for part in parts if part[1] + part[2] <= self._room(part[0])])
        for source, target in step.copies:
            for offset in range(PAGE_SIZE):
                content_of_source = self.slots.get(source * PAGE_SIZE + offset, 0)
                self.slots[target * PAGE_SIZE + offset] = content_of_source

    def _pass(self, parts: list[tuple[Sequence, int, int]]) -> None:
        contents = [self._contents(sequence, start + count) for sequence, start, count in parts]
        for (sequence, start, count), content in zip(parts, contents, strict=True):
            for i in range(len(self.groups)):
                for position in range(start, start + count):
                    self.slots[self._slot(sequence, i, position)] = content[position]
        for (sequence, start, count), content in zip(parts, contents, strict=True):
            for i, group in enumerate(self.groups):
                first = 0 if group.window is None else max(start - group.window + 1, 0)
                for position in range(first, start + count):
                    assert self.slots[self._slot(sequence, i, position)] == content[position]

    def _room(self, sequence: Sequence) -> int:
        """What is drawn beyond a sequence's end has no page, and is not wanted."""
        return min(run.end for run in sequence.pages.runs) * PAGE_SIZE

    def _contents(self, sequence: Sequence, end: int) -> list[int]:
        told, contents = 0, []
        for token in [*sequence.tokens, *[7] * end][:end]:  # every token that is drawn is 7
            told = hash((told, token))
            contents.append(told)
        return contents

    def _slot(self, sequence: Sequence, group: int, position: int) -> int:
        run = sequence.pages.runs[group]
        assert run.first <= position // PAGE_SIZE
        return run.pages[position // PAGE_SIZE - run.first] * PAGE_SIZE + position % PAGE_SIZE


def near(window: int, tokens: int) -> CacheGroup:
    """A group with a window, where steps have at most `tokens` tokens."""
    return CacheGroup(window, -(-(window + tokens) // PAGE_SIZE) + 1)


WINDOWS = {"full": [None], "mixed": [None, 70], "two": [100, None, 3], "near": [90]}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_random_load_with_aborts_reads_what_it_wrote_and_returns_every_page(windows, seed):
    rnd = random.Random(seed)
    tokens, scale = rnd.choice([16, 100]), len(windows)
    groups = [CacheGroup() if window is None else near(window, tokens) for window in windows]
    scheduler = make(
        pages=rnd.choice([12, 20, 60]) * scale, batch=rnd.choice([1, 3, 8]), tokens=tokens, groups=groups
    )
    device = Device(scheduler)
    scheduler.decode_steps = rnd.choice([1, 1, 3])
    flight: list[Step] = []
    live: list[Sequence] = []
    for turn in range(800):
        if rnd.random() < 0.1 and turn < 600:
            prompt = [rnd.randrange(2)] * rnd.choice([1, 5, 63, 64, 65, 150])
            n = rnd.choice([1, 1, 2]) if scheduler.cache.pool.num_pages > 15 * scale else 1
            n = min(n, len(scheduler._slots) + len(scheduler.running))
            first = scheduler.add(request(prompt, new=rnd.randrange(1, 90), n=n))
            live += [first, *first.siblings]
        if rnd.random() < 0.05 and live:
            sequence = rnd.choice(live)
            whole = [s for s in live if s.request is sequence.request and not s.finished]
            for s in whole:
                scheduler.finish(s)
        try:
            step = scheduler.schedule()
        except DrainFirst:
            while flight:
                read(scheduler, flight.pop(0))
            continue
        if step:
            device.run(step)
            flight.append(step)
        if flight and (step is None or len(flight) > 1):
            read(scheduler, flight.pop(0))
        scheduler.check_integrity()
    for step in flight:
        read(scheduler, step)
    run(scheduler)
    assert scheduler.cache.pool.used == 0
    assert not scheduler.running
