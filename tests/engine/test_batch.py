"""What is packed on the host comes out in the step: each row's slot, and the dump slot for padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.cache.layout import CacheGroup
from lmdeploy_jax.cache.manager import PageRun, PageTable
from lmdeploy_jax.engine.core.batch import (
    DecodeLayout,
    ImageLayout,
    RaggedLayout,
    Slots,
    decode_batch,
    ragged_batch,
)
from lmdeploy_jax.engine.core.buckets import plan
from lmdeploy_jax.engine.core.page_tables import PageTables
from lmdeploy_jax.engine.core.step import Chunk
from lmdeploy_jax.engine.request import Request, SamplingParams, Sequence
from lmdeploy_jax.prompt import EncodedPrompt, RopePositions

SLOTS, SESSION = 4, 256


def chunk(slot: int, start: int, count: int, *, decoding: bool) -> Chunk:
    prompt = list(range(10 * slot, 10 * slot + start + count))
    sequence = Sequence(Request(EncodedPrompt(prompt), SamplingParams(max_new_tokens=9), print), 0, prompt)
    sequence.slot = slot
    sequence.pages = PageTable([PageRun(0, [2 * slot + 1, 2 * slot + 2])])
    return Chunk(sequence, start, count, from_device=decoding)


@pytest.fixture
def slots():
    return Slots(PageTables(SESSION, [CacheGroup()], plan("gpu", SLOTS, 256)), vocab_size=100)


def test_a_decode_step_knows_its_sequences_slots(slots):
    layout = DecodeLayout(slots, rows=3)
    packed = layout.pack([chunk(2, 5, 1, decoding=True), chunk(0, 70, 1, decoding=True)])
    batch = jax.jit(lambda packed: decode_batch(layout.views(packed), jnp.asarray([7, 8, 9])))(packed)
    assert batch.sequence_slots.tolist() == [2, 0, SLOTS]
    assert batch.rope_positions.tolist() == [5, 70, 0]
    assert batch.attention[0].kv_lens.tolist() == [6, 71, 0]
    assert batch.attention[0].slots.tolist() == [5 * 64 + 5, 2 * 64 + 6, 0]
    assert batch.embeddings is None


def test_positions_of_time_row_and_column_reach_a_step(slots):
    """A chunk from within the prompt into what was drawn; text turns by one position. Other models' steps are
    told nothing of it.
    """
    with_mrope = Slots(slots.tables, vocab_size=100, mrope=True)
    turned = np.array([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]], np.int32)
    prompt = EncodedPrompt(range(4), rope=RopePositions(turned, -1))
    running = chunk(2, 2, 3, decoding=False)
    running.sequence.request = Request(prompt, SamplingParams(max_new_tokens=9), print)
    other = chunk(1, 5, 1, decoding=True)
    ragged, images = RaggedLayout(with_mrope, 8, 4), ImageLayout(with_mrope, 8, 4)
    found = [
        jax.jit(lambda packed, layout=layout: ragged_batch(layout.views(packed), jnp.zeros(5, jnp.int32)))(
            layout.pack([running, other])
        ).rope_positions.tolist()
        for layout in (ragged, images)
    ]
    assert found[0][:4] == [1, 3, 3, 5]  # no token of the step has a row of an image
    assert [axis[:4] for axis in found[1]] == [[1, 3, 3, 5], [2, 3, 3, 5], [1, 3, 3, 5]]
    drawn = chunk(2, 6, 1, decoding=True)
    drawn.sequence.request = running.sequence.request
    layout = DecodeLayout(with_mrope, rows=3)
    step = jax.jit(lambda packed: decode_batch(layout.views(packed), jnp.zeros(3, jnp.int32), 2))
    assert step(layout.pack([drawn, other])).rope_positions.tolist()[:2] == [7, 7]
    for plain, more in ((DecodeLayout(slots, 3), layout), (RaggedLayout(slots, 8, 4), ragged)):
        assert not {"rope_offsets", "rope_positions"} & plain.views(np.zeros(plain.size)).keys()
        assert plain.size < more.size


def test_a_ragged_step_knows_its_sequences_slots(slots):
    layout = RaggedLayout(slots, tokens=8, tile_rows=4)
    packed = layout.pack([chunk(3, 2, 4, decoding=False), chunk(1, 65, 1, decoding=True)])
    pending = jnp.asarray([90, 91, 92, 93, 94])
    batch = jax.jit(lambda packed: ragged_batch(layout.views(packed), pending))(packed)
    assert batch.sequence_slots.tolist() == [3, 1, SLOTS, SLOTS]
    assert batch.tokens.tolist()[:5] == [32, 33, 34, 35, 91]
    assert batch.rope_positions.tolist()[:5] == [2, 3, 4, 5, 65]
    assert batch.attention[0].kv_lens.tolist() == [6, 66, 0, 0]
    assert batch.attention[0].slots.tolist()[:5] == [
        7 * 64 + 2,
        7 * 64 + 3,
        7 * 64 + 4,
        7 * 64 + 5,
        4 * 64 + 1,
    ]


def test_a_group_with_a_window_sees_a_sequence_from_its_first_page_on():
    groups = [CacheGroup(), CacheGroup(window=70, most_pages=4)]
    slots = Slots(PageTables(SESSION, groups, plan("gpu", SLOTS, 64)), vocab_size=100)
    decoding, prompt = chunk(2, 201, 1, decoding=True), chunk(0, 130, 9, decoding=False)
    decoding.sequence.pages = PageTable([PageRun(0, [1, 2, 3, 4]), PageRun(2, [5, 6])])
    prompt.sequence.pages = PageTable([PageRun(0, [7, 8, 9]), PageRun(0, [10, 11, 12])])
    layout = DecodeLayout(slots, rows=2)
    batch = decode_batch(layout.views(jnp.asarray(layout.pack([decoding]))), jnp.zeros(2, jnp.int32))
    full, near = batch.attention
    assert batch.rope_positions.tolist() == [201, 0]
    assert (full.kv_lens.tolist(), near.kv_lens.tolist()) == ([202, 0], [202 - 2 * 64, 0])
    assert (full.slots.tolist(), near.slots.tolist()) == ([4 * 64 + 9, 0], [6 * 64 + 9, 0])
    assert near.page_table.tolist() == [[5, 6, 0], [0, 0, 0]]
    layout = RaggedLayout(slots, tokens=16, tile_rows=8)
    full, near = ragged_batch(
        layout.views(jnp.asarray(layout.pack([decoding, prompt]))), jnp.zeros(5)
    ).attention
    assert near.kv_lens.tolist()[:2] == [202 - 2 * 64, 139]
    assert near.slots.tolist()[:2] == [6 * 64 + 9, 12 * 64 + 2]
    behind = full.tiles[:, 3] - near.tiles[:, 3]
    assert behind.tolist() == jnp.where((full.tiles[:, 2] > 0) & (full.tiles[:, 0] == 0), 128, 0).tolist()
