"""The cache as a step's mixers see it, one after another."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lmdeploy_jax.cache.kinds import StateCache
from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.models.kernels import LayerCache
from lmdeploy_jax.pallas_kernels.spans import Spans, decode_spans, ragged_spans

Where = AttentionMetadata | Spans  # a step's sequences, as mixers with pages and those with a state see them


class StepCache:
    """Mixers are numbered through all layers; `cache` has what those so far have written."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache = cache
        self._batch = batch
        self._counters = _split_counters(cache, len(batch.attention[0].kv_lens))
        self._spans = _spans(cache, batch) if cache.layout.states else None

    def of(self, mixer: int) -> tuple[LayerCache, Where]:
        """The mixer's arrays, and where it finds the step's sequences."""
        group, arrays = self.cache.layout.places[mixer][0], self.cache.of_mixer(mixer)
        if group is None:
            assert self._spans is not None
            return arrays, self._spans
        return (*arrays, self._counters[arrays[0].shape[1]]), self._batch.attention[group]

    def put(self, mixer: int, arrays: LayerCache) -> None:
        """What the mixer has made of them."""
        if self.cache.layout.places[mixer][0] is not None:
            self._counters[arrays[0].shape[1]] = arrays[-1]
            arrays = arrays[:-1]
        self.cache = self.cache.with_mixer(mixer, arrays)


def _split_counters(cache: KVCache, rows: int) -> dict[int, Array]:
    """What layers of as many KV heads share, see `paged_attention`."""
    kinds = zip(cache.layout.arrays, cache.arrays, strict=True)
    heads = {arrays[0].shape[1] for kind, arrays in kinds if not isinstance(kind, StateCache)}
    return {count: jnp.zeros((rows, count), jnp.int32) for count in sorted(heads)}


def _spans(cache: KVCache, batch: Batch) -> Spans:
    """What layers with a state see of the step; positions are those of a group without a window."""
    whole = [group.window is None for group in cache.layout.groups].index(True)
    metadata = batch.attention[whole]
    if metadata.tiles is None:
        return decode_spans(batch.sequence_slots, metadata.kv_lens)
    return ragged_spans(batch.sequence_slots, metadata.tiles)
