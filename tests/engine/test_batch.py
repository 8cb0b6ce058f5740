"""What is packed on the host comes out in the step: each row's slot, and the dump slot for padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lmdeploy_jax.engine.core.batch import DecodeLayout, RaggedLayout, Slots, decode_batch, ragged_batch
from lmdeploy_jax.engine.core.scheduler import Chunk
from lmdeploy_jax.engine.request import Request, SamplingParams, Sequence
from lmdeploy_jax.prompt import EncodedPrompt

SLOTS, SESSION = 4, 256


def chunk(slot: int, start: int, count: int, *, decoding: bool) -> Chunk:
    prompt = list(range(10 * slot, 10 * slot + start + count))
    sequence = Sequence(Request(EncodedPrompt(prompt), SamplingParams(max_new_tokens=9), print), 0, prompt)
    sequence.slot, sequence.pages = slot, [2 * slot + 1, 2 * slot + 2]
    return Chunk(sequence, start, count, from_device=decoding)


@pytest.fixture
def slots():
    return Slots(SLOTS, SESSION, vocab_size=100)


def test_a_decode_step_knows_its_sequences_slots(slots):
    layout = DecodeLayout(slots, rows=3)
    packed = layout.pack([chunk(2, 5, 1, decoding=True), chunk(0, 70, 1, decoding=True)])
    batch = jax.jit(lambda packed: decode_batch(layout.views(packed), jnp.asarray([7, 8, 9])))(packed)
    assert batch.sequence_slots.tolist() == [2, 0, SLOTS]
    assert batch.rope_positions.tolist() == [5, 70, 0]
    assert batch.attention[0].kv_lens.tolist() == [6, 71, 0]
    assert batch.attention[0].slots.tolist() == [5 * 64 + 5, 2 * 64 + 6, 0]
    assert batch.embeddings is None


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
