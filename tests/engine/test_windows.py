"""Layers with a window keep a window's worth of pages, and every path still gives the plain path's tokens."""

import pytest

from lmdeploy_jax.cache.kv import page_bytes
from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.engine.core import setup
from tests.engine.harness import Collector, generate, submit, tokens
from tests.oracle import save_checkpoint

FAMILIES = {  # each with the windows of its cache groups
    "gemma3": [24, None],
    "gemma4": [None],  # a window and two sizes of heads, and two layers that read what others keep
    "llama4": [64, 64, 64, None],
    "mistral_window": [24],
}


@pytest.fixture(
    scope="module",
    params=["gemma3", *(pytest.param(name, marks=pytest.mark.full) for name in list(FAMILIES)[1:])],
)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_checkpoint(family, tmp_path_factory.mktemp("windows") / family)


def test_batched_and_cached_prompts_are_answered_as_alone(start, family, prompts, answers):
    engine = start()
    assert [group.window for group in engine.facts.cache_layout.groups] == FAMILIES[family]
    assert tokens(engine, prompts) == answers
    hit = generate(engine, prompts[-1:])[0][0]
    assert (hit.tokens, hit.last.cached_tokens) == (answers[-1], 3 * PAGE_SIZE)
    turn = [*prompts[-1], *answers[-1], 11, 12]
    warm = generate(engine, [turn])[0][0]
    assert warm.last.cached_tokens == 3 * PAGE_SIZE
    cold = start(enable_prefix_caching=False)
    assert tokens(cold, [turn]) == [warm.tokens]


def test_small_chunks_and_several_decode_steps_equal_large_and_single_ones(start, prompts, answers):
    engine = start(max_prefill_token_num=16, decode_steps=3, enable_prefix_caching=False)
    assert tokens(engine, prompts) == answers


def test_preempted_sequences_equal_undisturbed_ones(start, family, prompts, answers):
    layout = start(session_len=256).facts.cache_layout
    size = page_bytes(layout.paged, "float32")
    groups = len(FAMILIES[family])
    engine = start(cache_max_entry_count=(5 * groups + 1) * size, session_len=256)
    assert engine.memory.num_pages == 5 * groups + 1
    assert tokens(engine, prompts[1:] * 2) == answers[1:] * 2
    if family == "gemma3":  # the others never need more than they got
        assert engine.scheduler.preemptions


@pytest.mark.full
def test_forked_sequences_equal_single_ones(start, prompts, answers):
    engine = start()
    for results, answer in zip(generate(engine, prompts, n=3), answers, strict=True):
        assert [result.tokens for result in results] == [answer] * 3


def test_a_long_answer_holds_no_more_than_its_window(start, prompts):
    engine = start(enable_prefix_caching=False)
    if engine.facts.cache_layout.groups[0].window is None:
        pytest.skip("keeps all tokens")
    seen = []
    collector = Collector()
    running = engine.scheduler.running

    def listen(out):
        seen.append([len(s.pages.runs[0].pages) for s in running])
        collector(out)

    submit(engine, prompts[-1], listen, max_new_tokens=250)
    collector.wait()
    assert max(pages for step in seen for pages in step) <= engine.facts.cache_layout.groups[0].most_pages
    late = [pages for step in seen[5:] for pages in step]
    assert max(late) <= 2  # 24 tokens and the one that is drawn lie in two pages at most


@pytest.mark.full
def test_interpreted_kernels_see_a_window_from_its_first_page_on(start, monkeypatch, prompts, answers):
    monkeypatch.setattr(setup, "choose_backend", lambda *_: "pallas_interpret")
    assert tokens(start(), prompts[-1:]) == answers[-1:]
