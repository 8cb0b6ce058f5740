import random

import pytest

from lmdeploy_jax.cache.pages import PAGE_SIZE, PagePool, pages_for
from lmdeploy_jax.cache.prefix import PrefixCache
from lmdeploy_jax.prompt import EncodedPrompt, Span

PLAIN = EncodedPrompt([])
TOKENS = list(range(3 * PAGE_SIZE))


def test_pages_for_rounds_up():
    assert [pages_for(n) for n in (0, 1, 63, 64, 65)] == [0, 1, 1, 1, 2]


def test_the_dump_page_is_never_handed_out():
    pool = PagePool(5)
    assert sorted(pool.take() for _ in range(4)) == [1, 2, 3, 4]
    with pytest.raises(IndexError, match="empty"):
        pool.take()


def test_a_shared_page_stays_until_its_last_user_is_gone():
    pool = PagePool(3)
    page = pool.take()
    pool.share(page)
    pool.release([page])
    assert pool.available == 1
    pool.release([page])
    assert pool.available == 2


def test_releasing_too_often_is_an_error():
    pool = PagePool(3)
    page = pool.take()
    pool.release([page])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([page])


def test_integrity_check_sees_a_lost_page():
    pool = PagePool(4)
    page = pool.take()
    pool.check_integrity([page])
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def _filled(cache: PrefixCache, tokens: list[int], prompt: EncodedPrompt = PLAIN) -> list[int]:
    pages, hashes = cache.match(prompt, tokens, len(tokens))
    pages += [cache.pool.take() for _ in range(pages_for(len(tokens)) - len(pages))]
    cache.register(prompt, tokens, len(tokens), pages, hashes)
    return pages


def test_prefixes_are_found_page_by_page():
    cache = PrefixCache(20)
    tokens = list(range(3 * PAGE_SIZE + 7))
    pages = _filled(cache, tokens)
    assert cache.match(PLAIN, tokens, len(tokens))[0] == pages[:3]
    assert cache.match(PLAIN, tokens, 2 * PAGE_SIZE + 63)[0] == pages[:2]
    other = tokens[: PAGE_SIZE + 5] + [9] * PAGE_SIZE
    assert cache.match(PLAIN, other, len(other))[0] == pages[:1]
    assert cache.match(PLAIN, [9, *tokens], 200)[0] == []  # the same tokens at another place are another page


def test_a_page_depends_on_everything_before_it():
    cache = PrefixCache(20)
    tail = list(range(PAGE_SIZE))
    _filled(cache, [1] * PAGE_SIZE + tail)
    assert len(cache.match(PLAIN, [2] * PAGE_SIZE + tail, 2 * PAGE_SIZE)[0]) == 0


def test_only_prompts_of_the_same_salt_share_pages():
    cache = PrefixCache(20)
    own = EncodedPrompt(TOKENS, salt=b"tenant 1")
    pages = _filled(cache, TOKENS, own)
    for other in (PLAIN, EncodedPrompt(TOKENS, salt=b"tenant 2")):
        assert cache.match(other, TOKENS, len(TOKENS)) == ([], [])
    plain = _filled(cache, TOKENS)
    assert cache.match(own, TOKENS, len(TOKENS))[0] == pages
    assert cache.match(PLAIN, TOKENS, len(TOKENS))[0] == plain


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
    cache = PrefixCache(20)
    tokens = [5] * 4 * PAGE_SIZE
    pages = _filled(cache, tokens, EncodedPrompt(tokens, (IMAGE,)))
    found, _ = cache.match(EncodedPrompt(tokens, spans), tokens, len(tokens))
    assert found == pages[:shared]


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
    cache = PrefixCache(5)
    old, new = [1] * 2 * PAGE_SIZE, [2] * 2 * PAGE_SIZE
    cache.release(_filled(cache, old))
    cache.release(_filled(cache, new))
    taken = [cache.pool.take()]
    assert len(cache.match(PLAIN, old, len(old))[0]) == 1  # its second page went
    cache.pool.check_integrity([*taken, *cache.match(PLAIN, old, len(old))[0] * 2])
    assert len(cache.match(PLAIN, new, len(new))[0]) == 2


def test_a_disabled_cache_only_counts_pages():
    cache = PrefixCache(5, enabled=False)
    tokens = [1] * PAGE_SIZE
    cache.release(_filled(cache, tokens))
    assert cache.match(PLAIN, tokens, len(tokens)) == ([], [])
    assert cache.pool.available == 4


@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_loses_a_page(seed):
    rnd = random.Random(seed)
    cache = PrefixCache(12)
    held: list[list[int]] = []
    for _ in range(500):
        tokens = [rnd.randrange(2)] * PAGE_SIZE * rnd.randrange(1, 4)
        if rnd.random() < 0.5 and cache.pool.available >= 3:
            held.append(_filled(cache, tokens))
        elif held:
            cache.release(held.pop(rnd.randrange(len(held))))
        cache.pool.check_integrity(p for pages in held for p in pages)
