"""What XLA makes of a decode step: no weight copied, caches updated in place, layers traced once."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.converters.load import build_skeleton
from lmdeploy_jax.models import kernels
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.models.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MlpConfig,
    RopeConfig,
)
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.pallas_kernels.options import AttentionOptions

LAYERS = 4
WINDOWS = (None, None, 8, 8)
CONFIG = DecoderConfig(
    hidden_size=96,
    vocab_size=331,
    max_position=128,
    layers=tuple(
        LayerConfig(
            AttentionConfig(6, 2, 16, AttentionOptions(0.25, window), RopeConfig(16), qkv_bias=True),
            MlpConfig(160),
        )
        for window in WINDOWS
    ),
)
CACHE = (9, 2, 64, 16)
LAYOUT = CONFIG.cache_layout(1, session_len=1, step_tokens=1)  # no window is outgrown: one cache group


@pytest.fixture(scope="module")
def program():
    """(times a layer was traced, optimised HLO) of a decode step of three rows."""
    skeleton = build_skeleton(CONFIG, jnp.dtype("float32"), Kernels())
    traced = []

    def step(leaves, caches, batch):
        decoder = skeleton.merge(leaves)
        hidden, caches = decoder(caches, batch)
        return decoder.logits(hidden), caches

    def counting(qkv, *rest, real=kernels.paged_attention, **options):
        traced.append(qkv.shape)
        return real(qkv, *rest, **options)

    row = jax.ShapeDtypeStruct((3,), jnp.int32)
    table = jax.ShapeDtypeStruct((3, 2), jnp.int32)
    batch = Batch(row, row, row, (AttentionMetadata(row, table, row),), row)
    caches = KVCache(((jax.ShapeDtypeStruct(CACHE, jnp.float32),) * 2,) * LAYERS, LAYOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "paged_attention", counting)
        lowered = jax.jit(step, donate_argnums=1).lower(tuple(skeleton.specs.values()), caches, batch)
    return len(traced), lowered.compile().as_text()


def test_layers_alike_are_traced_once(program):
    kinds = len(set(WINDOWS))
    assert program[0] == kinds + 1  # the first layer has nothing to add to the residual stream


def test_no_weight_or_cache_is_copied_or_transposed(program):
    """CPU programs have copied n-d weights before each product: eight times the step's time."""
    specs = build_skeleton(CONFIG, jnp.dtype("float32"), Kernels()).specs.values()
    sizes = {prod(spec.shape) for spec in specs if prod(spec.shape) >= CONFIG.hidden_size**2} | {prod(CACHE)}
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", program[1])
    assert [shape for shape in moved if prod(map(int, shape.split(","))) in sizes] == []


def test_caches_are_updated_in_place(program):
    header = program[1].splitlines()[0]
    assert len(re.findall(r"(?:may|must)-alias", header)) == 2 * LAYERS


def test_embedding_multiplier_keeps_the_dtype():
    """Gemma scales by sqrt(hidden size), rounded to the weights' dtype first."""
    config = replace(CONFIG, embedding_multiplier=96**0.5, logit_multiplier=0.5)
    skeleton = build_skeleton(config, jnp.dtype("bfloat16"), Kernels())
    row = jax.ShapeDtypeStruct((3,), jnp.int32)
    attention = AttentionMetadata(row, jax.ShapeDtypeStruct((3, 2), jnp.int32), row)
    batch = Batch(row, row, row, (attention,), row)
    caches = KVCache(((jax.ShapeDtypeStruct(CACHE, jnp.bfloat16),) * 2,) * LAYERS, LAYOUT)
    leaves = tuple(skeleton.specs.values())
    hidden, written = jax.eval_shape(lambda x, c, b: skeleton.merge(x)(c, b), leaves, caches, batch)
    logits = jax.eval_shape(lambda x, h: skeleton.merge(x).logits(h), leaves, hidden)
    assert (hidden.dtype, logits.dtype, logits.shape) == (jnp.bfloat16, np.float32, (3, 331))
    assert written.of_mixer(0)[0].dtype == jnp.bfloat16
