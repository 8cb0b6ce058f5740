"""Which layers share arrays and page tables, and what a sequence takes."""

import pytest

from lmdeploy_jax.cache.kinds import PagedCache, SharedCache, StateCache
from lmdeploy_jax.cache.layout import MOST_GROUPS, CacheGroup, plan_layout
from lmdeploy_jax.cache.pages import PAGE_SIZE, pages_for

FULL = PagedCache(kv_heads=2, head_dim=16)
NEAR = PagedCache(kv_heads=2, head_dim=16, window=1024)
GEMMA_3 = {"4b": (29, 5), "12b": (40, 8), "27b": (52, 10)}  # layers with a window, and without


def plan(*kinds: PagedCache, session_len: int = 16384, step_tokens: int = 8192):
    return plan_layout(kinds, session_len=session_len, step_tokens=step_tokens)


def pattern(near: int, full: int) -> list[PagedCache]:
    """Five with a window, one without, and so on, the rest with a window."""
    kinds = ([NEAR] * 5 + [FULL]) * full
    return kinds + [NEAR] * (near - 5 * full)


def check(layout, kinds) -> None:
    """Each layer has an array of its shape that no other layer of its group has."""
    assert len(set(layout.places)) == len(kinds)
    for kind, (group, array) in zip(kinds, layout.places, strict=True):
        assert layout.groups[group].window in (kind.window, None)
        assert (layout.arrays[array].kv_heads, layout.arrays[array].head_dim) == (
            kind.kv_heads,
            kind.head_dim,
        )


def test_layers_alike_are_one_group_with_arrays_of_their_own():
    layout = plan(*[FULL] * 4)
    assert layout.groups == (CacheGroup(),)
    assert layout.places == ((0, 0), (0, 1), (0, 2), (0, 3))
    assert [group.window for group in layout.groups] == [None]


def test_layers_that_all_have_a_window_are_one_group_too():
    layout = plan(*[NEAR] * 4)
    assert [group.window for group in layout.groups] == [1024]
    assert len(layout.arrays) == 4


def test_a_layer_that_reads_anothers_keys_and_values_has_its_place():
    layout = plan(NEAR, FULL, SharedCache(0), SharedCache(1))
    assert layout.places[2:] == layout.places[:2]
    assert layout.arrays == plan(NEAR, FULL).arrays


def test_a_window_that_no_sequence_outgrows_is_none():
    assert plan(NEAR, FULL, session_len=1024).groups == (CacheGroup(),)


@pytest.mark.parametrize(("near", "full"), GEMMA_3.values(), ids=GEMMA_3)
def test_gemma_3_holds_three_times_the_tokens_in_the_same_memory(near, full):
    kinds = pattern(near, full)
    layout = plan(*kinds)
    check(layout, kinds)
    assert len(layout.groups) <= MOST_GROUPS
    memory = 10_000 * len(kinds)  # in pages of one layer
    before = memory // len(kinds) * PAGE_SIZE
    assert layout.room(memory // len(layout.arrays), 16384) >= 3 * before


def test_groups_of_unequal_numbers_of_layers_waste_little():
    kinds = [NEAR] * 7 + [FULL] * 3
    layout = plan(*kinds)
    check(layout, kinds)
    assert len(layout.arrays) == 3
    assert [group.window for group in layout.groups] == [1024, 1024, 1024, None]


def test_heads_of_two_sizes_keep_arrays_of_their_own():
    wide = PagedCache(kv_heads=1, head_dim=64)
    kinds = [NEAR, NEAR, wide]
    check(plan(*kinds), kinds)


def test_what_a_group_holds_never_exceeds_what_it_says():
    group = plan(NEAR, FULL).groups[0]
    assert group.window == 1024
    for position in range(0, 3000, 7):
        for tokens in (1, 63, 64, 65, 8192):
            needed = pages_for(position + tokens) - group.first_page(position)
            assert needed <= group.width(10**6, tokens)
            assert group.first_page(position) * PAGE_SIZE <= max(position - 1023, 0)


def test_layers_with_a_state_have_arrays_of_their_own_and_no_pages():
    state = StateCache(conv=(2, 3, 8), state=(4, 16, 12))
    layout = plan(state, FULL, state, FULL)
    assert layout.places == ((None, 2), (0, 0), (None, 3), (0, 1))
    assert (layout.paged, layout.states) == ((FULL, FULL), (state, state))
    assert layout.pages_of(1000) == plan(FULL, FULL).pages_of(1000)
    assert state.slot_bytes(2) == 2 * 2 * 3 * 8 + 4 * 4 * 16 * 12
