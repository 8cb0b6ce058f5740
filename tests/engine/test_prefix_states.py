"""States behind prefixes: what is kept, found and copied, against a device that holds each slot's tokens."""

from __future__ import annotations

import random

from lmdeploy_jax.cache.manager import CacheManager
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.cache.states import StateIndex
from lmdeploy_jax.engine.core.scheduler import DrainFirst, Scheduler
from lmdeploy_jax.engine.core.step import Step
from tests.engine.test_scheduler import FULL, SESSION, read, request

BATCH, ANY = 4, 7  # ANY: the token that every sequence draws


def make(*, kept: int = 4, pages: int = 60, tokens: int = 256, batch: int = BATCH) -> Scheduler:
    cache = CacheManager(pages, FULL, states=StateIndex(range(batch, batch + kept)))
    return Scheduler(cache, max_batch_size=batch, max_tokens=tokens, session_len=SESSION)


class Device:
    """Rows of states, each the tokens that have gone into it."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[int, ...]] = {}

    def run(self, step: Step) -> None:
        self.copy(step.restored)
        for chunk in step.chunks:
            sequence = chunk.sequence
            known = (*sequence.tokens, *(ANY,) * (sequence.length - len(sequence.tokens)))
            if chunk.start:
                assert self.rows[sequence.slot] == known[: chunk.start], "a step goes on from another state"
            self.rows[sequence.slot] = known[: chunk.start + chunk.count]
        self.copy(step.kept)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        self.rows |= {target: self.rows[source] for source, target in copies}


def run(scheduler: Scheduler, device: Device) -> list[Step]:
    """Schedules until nothing is left, a step ahead of reading."""
    steps: list[Step] = []
    flight: list[Step] = []
    while scheduler.has_work:
        try:
            step = scheduler.schedule()
        except DrainFirst:
            while flight:
                read(scheduler, flight.pop(0), ANY)
            continue
        if step is not None:
            device.run(step)
            steps.append(step)
            flight.append(step)
        if flight and (step is None or len(flight) > 1):
            read(scheduler, flight.pop(0), ANY)
        scheduler.check_integrity()
    return steps


def answer(scheduler: Scheduler, device: Device, prompt: list[int], **params) -> tuple[int, list[int]]:
    """The prompt's cached tokens, and the tokens of each step in which it was computed."""
    sequence = scheduler.add(request(prompt, **params))
    steps = run(scheduler, device)
    return sequence.cached, [step.num_tokens for step in steps if not step.decode_only]


def prompt(*parts: tuple[int, int]) -> list[int]:
    """So many tokens of each number."""
    return [token for count, token in parts for _ in range(count)]


def test_a_prompt_is_cut_behind_its_last_full_page_and_goes_on_from_there_the_next_time():
    scheduler, device = make(), Device()
    assert answer(scheduler, device, prompt((200, 1))) == (0, [192, 8])
    assert answer(scheduler, device, prompt((200, 1))) == (192, [8])
    assert answer(scheduler, device, prompt((200, 1), (70, 2))) == (192, [64, 14])
    assert answer(scheduler, device, prompt((63, 3))) == (0, [63])  # no full page: no cut
    assert answer(scheduler, device, prompt((128, 4))) == (0, [64, 64])  # its last token must be computed


def test_what_prompts_share_is_kept_by_the_second_and_found_by_the_third():
    scheduler, device = make(), Device()
    assert answer(scheduler, device, prompt((130, 1), (90, 2))) == (0, [192, 28])
    assert answer(scheduler, device, prompt((130, 1), (90, 3))) == (0, [128, 64, 28])
    assert answer(scheduler, device, prompt((130, 1), (90, 4))) == (128, [64, 28])


def test_of_too_many_states_the_longest_unused_gives_way():
    scheduler, device = make(kept=2), Device()
    first, second, third = (prompt((100, n)) for n in (1, 2, 3))
    assert [answer(scheduler, device, each)[0] for each in (first, second, first)] == [0, 0, 64]
    assert [answer(scheduler, device, each)[0] for each in (third, first, second)] == [0, 64, 0]


def test_an_answer_is_computed_again_as_what_a_stop_has_cut_off_must_not_be_found():
    scheduler, device = make(), Device()
    assert answer(scheduler, device, prompt((100, 1)), new=60)[0] == 0
    assert answer(scheduler, device, prompt((100, 1), (59, ANY)))[0] == 64


def test_nothing_is_found_of_what_is_discarded():
    scheduler, device = make(), Device()
    sequence = scheduler.add(request(prompt((200, 1))))
    step = scheduler.schedule()
    assert step is not None
    device.run(step)
    scheduler.discard_cache(sequence)
    scheduler.finish(sequence)
    assert answer(scheduler, device, prompt((200, 1)))[0] == 0


def test_every_step_goes_on_from_its_own_state():
    """With few pages, so that sequences are preempted, few states, forks, and prompts that share a begin."""
    hits = preemptions = 0
    for seed in range(20):
        draw = random.Random(seed)
        kept, pages = draw.choice((1, 3, 6)), draw.choice((9, 40))
        scheduler, device = make(kept=kept, pages=pages, tokens=96, batch=3), Device()
        begins = [[draw.randrange(9) for _ in range(draw.randrange(150))] for _ in range(3)]
        found = []
        for _ in range(30):
            begin = draw.choice(begins)
            ids = begin[: draw.randrange(len(begin) + 1)] + [9] * draw.randrange(1, 90)
            params = {"new": draw.randrange(1, 150), "n": draw.choice((1, 1, 1, 2))}
            found.append(scheduler.add(request(ids, **params)))
            if not draw.randrange(4):
                run(scheduler, device)
        run(scheduler, device)
        assert all(sequence.cached % PAGE_SIZE == 0 for sequence in found)
        hits += sum(sequence.cached > 0 for sequence in found)
        preemptions += scheduler.preemptions
    assert hits > 10
    assert preemptions > 10
