"""Which pages sequences hold and find again, in one cache group and in several with windows."""

import random

import pytest

from lmdeploy_jax.cache.layout import CacheGroup
from lmdeploy_jax.cache.manager import CacheManager, PageTable
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.prompt import EncodedPrompt, Span

PLAIN = EncodedPrompt([])
TOKENS = list(range(3 * PAGE_SIZE))
FULL = CacheGroup()
WINDOWED = CacheGroup(window=100, most_pages=6)  # in steps of at most 200 tokens


def _filled(cache: CacheManager, tokens: list[int], prompt: EncodedPrompt = PLAIN) -> PageTable:
    """Takes the pages of a prompt and computes it in one step."""
    table, hashes, *_ = cache.match(prompt, tokens, len(tokens), [])
    cache.hold(table, len(hashes) * PAGE_SIZE, len(tokens))
    cache.register(prompt, tokens, len(tokens), table, hashes)
    return table


def _found(
    cache: CacheManager,
    tokens: list[int],
    limit: int | None = None,
    group: int = 0,
    prompt: EncodedPrompt = PLAIN,
) -> list[int]:
    """Pages that a match shares, given back at once."""
    table, *_ = cache.match(prompt, tokens, len(tokens) if limit is None else limit, [])
    pages = list(table.runs[group].pages)
    cache.release(table)
    return pages


def test_prefixes_are_found_page_by_page():
    cache = CacheManager(20, [FULL])
    tokens = list(range(3 * PAGE_SIZE + 7))
    pages = _filled(cache, tokens).runs[0].pages
    assert _found(cache, tokens) == pages[:3]
    assert _found(cache, tokens, 2 * PAGE_SIZE + 63) == pages[:2]
    other = tokens[: PAGE_SIZE + 5] + [9] * PAGE_SIZE
    assert _found(cache, other) == pages[:1]
    assert _found(cache, [9, *tokens], 200) == []  # the same tokens at another place are another page


def test_a_page_depends_on_everything_before_it():
    cache = CacheManager(20, [FULL])
    tail = list(range(PAGE_SIZE))
    _filled(cache, [1] * PAGE_SIZE + tail)
    assert _found(cache, [2] * PAGE_SIZE + tail) == []


def test_only_prompts_of_the_same_salt_share_pages():
    cache = CacheManager(20, [FULL])
    own = EncodedPrompt(TOKENS, salt=b"tenant 1")
    pages = list(_filled(cache, TOKENS, own).pages)
    for other in (PLAIN, EncodedPrompt(TOKENS, salt=b"tenant 2")):
        assert _found(cache, TOKENS, prompt=other) == []
    plain = list(_filled(cache, TOKENS).pages)
    assert _found(cache, TOKENS, prompt=own) == pages
    assert _found(cache, TOKENS) == plain


IMAGE = Span(PAGE_SIZE + 40, 2 * PAGE_SIZE - 60, b"a cat")  # in the second and third of four pages


@pytest.mark.parametrize(
    ("spans", "shared"),
    [
        ((IMAGE,), 4),
        ((Span(IMAGE.start, IMAGE.length, b"a dog"),), 1),
        ((Span(IMAGE.start, IMAGE.length - 1, b"a cat"),), 1),
        ((Span(IMAGE.start - 1, IMAGE.length, b"a cat"),), 1),
        ((Span(0, 3, b"a flag"), IMAGE), 0),
        ((IMAGE, Span(IMAGE.stop, 1, b"a flag")), 2),
        ((), 1),
    ],
)
def test_pages_that_hold_parts_of_a_span_are_found_by_its_content(spans, shared):
    cache = CacheManager(20, [FULL])
    tokens = [5] * 4 * PAGE_SIZE
    pages = list(_filled(cache, tokens, EncodedPrompt(tokens, (IMAGE,))).pages)
    assert _found(cache, tokens, prompt=EncodedPrompt(tokens, spans)) == pages[:shared]


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, 5, b"x"), Span(4, 2, b"y")),
        (Span(8, 3, b"x"),),
        (Span(-1, 3, b"x"),),
        (Span(3, 0, b"x"),),
        (Span(6, 1, b"x"), Span(2, 1, b"y")),
    ],
)
def test_spans_lie_in_order_within_their_prompt(spans):
    with pytest.raises(ValueError, match="spans"):
        EncodedPrompt(range(10), spans)


def test_idle_pages_are_evicted_longest_unused_first_and_from_the_end_of_a_prefix():
    cache = CacheManager(5, [FULL])
    old, new = [1] * 2 * PAGE_SIZE, [2] * 2 * PAGE_SIZE
    cache.release(_filled(cache, old))
    cache.release(_filled(cache, new))
    taken = [cache.pool.take()]
    table, *_ = cache.match(PLAIN, old, len(old), [])
    assert len(table.runs[0].pages) == 1  # its second page went
    cache.pool.check_integrity([*taken, *table.pages])
    assert len(_found(cache, new)) == 2


def test_a_disabled_cache_only_counts_pages():
    cache = CacheManager(5, [FULL], enabled=False)
    tokens = [1] * PAGE_SIZE
    cache.release(_filled(cache, tokens))
    assert _found(cache, tokens) == []
    assert cache.pool.available == 4


def test_a_window_gives_pages_back_that_it_has_passed():
    cache = CacheManager(30, [FULL, WINDOWED])
    table, *_ = cache.match(PLAIN, [], 0, [])
    cache.hold(table, 0, 1000)  # the first step of a prompt of 1,000 tokens
    assert [(run.first, run.end) for run in table.runs] == [(0, 16), (0, 6)]
    cache.hold(table, 200, 1000)
    assert [(run.first, run.end) for run in table.runs] == [(0, 16), (1, 7)]
    cache.hold(table, 1000, 1001)
    assert [(run.first, run.end) for run in table.runs] == [(0, 16), (14, 16)]
    cache.pool.check_integrity(table.pages)


def test_a_prefix_is_found_where_the_windows_last_pages_are_there_too():
    cache = CacheManager(40, [FULL, WINDOWED])
    tokens = list(range(10 * PAGE_SIZE))
    table, hashes, *_ = cache.match(PLAIN, tokens, len(tokens), [])
    for start in range(0, len(tokens), 200):
        cache.hold(table, start, len(tokens))
        cache.register(PLAIN, tokens, min(start + 200, len(tokens)), table, hashes)
    windowed = list(table.runs[1].pages)
    cache.release(table)
    assert len(_found(cache, tokens)) == 10
    assert _found(cache, tokens, group=1) == windowed[-2:]  # 101 tokens back from token 640 on
    lost = windowed[-2]
    cache.pool.drop([lost])
    assert len(_found(cache, tokens)) == 8  # page 8 is gone, which a prefix of nine or ten pages needs
    assert len(_found(cache, tokens, group=1)) == 2


def test_a_model_of_windows_alone_finds_prefixes_by_their_end():
    cache = CacheManager(40, [WINDOWED])
    tokens = list(range(8 * PAGE_SIZE))
    table, hashes, *_ = cache.match(PLAIN, tokens, len(tokens), [])
    for start in range(0, len(tokens), PAGE_SIZE):
        cache.hold(table, start, start + PAGE_SIZE)
        cache.register(PLAIN, tokens, start + PAGE_SIZE, table, hashes)
    early = table.runs[0].first
    cache.release(table)
    idle = [cache.index.find(0, digest) for digest in hashes[:early]]
    cache.pool.drop(page for page in idle if page is not None)
    assert len(_found(cache, tokens)) == 2
    assert _found(cache, tokens[: 4 * PAGE_SIZE]) == []


def test_what_is_discarded_is_neither_found_nor_left_unclean():
    cache = CacheManager(40, [FULL, WINDOWED])
    tokens = list(range(8 * PAGE_SIZE))
    table, hashes, *_ = cache.match(PLAIN, tokens, len(tokens), [])
    for start in range(0, len(tokens), 200):
        cache.hold(table, start, len(tokens))
        cache.register(PLAIN, tokens, min(start + 200, len(tokens)), table, hashes)
    unclean = cache.discard(table, hashes)
    assert sorted(unclean) == list(range(1, 40))  # free ones may have been passed by the window
    cache.release(table)
    assert _found(cache, tokens) == []
    assert cache.pool.available == 39


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [(FULL,), (FULL, WINDOWED), (WINDOWED, WINDOWED)], ids=str)
def test_random_use_never_loses_a_page(groups, seed):
    rnd = random.Random(seed)
    cache = CacheManager(12, groups)
    held: list[PageTable] = []
    for _ in range(500):
        tokens = [rnd.randrange(2)] * PAGE_SIZE * rnd.randrange(1, 4)
        if rnd.random() < 0.5 and cache.pool.available >= 3 * len(groups):
            held.append(_filled(cache, tokens))
        elif held:
            cache.release(held.pop(rnd.randrange(len(held))))
        cache.pool.check_integrity(page for table in held for page in table.pages)
