"""What of the devices' memory the steps take, and what is left for the KV cache and for kept states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.sharding import Mesh

from lmdeploy_jax.cache.kv import MemoryPlan, gain, page_bytes, plan_memory, state_bytes
from lmdeploy_jax.cache.layout import CacheLayout
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.engine.core.buckets import Buckets

if TYPE_CHECKING:
    from lmdeploy_jax.converters.vision import LoadedVisionModel

WIDENED_AT_ONCE = 2  # quantised weights that XLA writes out: the next while one is multiplied with
KEPT_STATES = 0.1  # of the free memory, most of what states behind prefixes take


def plan(
    config: JaxEngineConfig,
    model: LoadedModel,
    vision: LoadedVisionModel | None,
    mesh: Mesh,
    buckets: Buckets,
    session_len: int,
    layout: CacheLayout,
    kept_states: int,
    free: int,
) -> MemoryPlan:
    """How much the KV cache gets of `free` bytes over all devices, beside what the steps need."""
    shape = model.config
    size = jnp.dtype(model.dtype).itemsize
    widest = max(layer.activations(shape.hidden_size) for layer in shape.layers)
    activations = buckets.max_tokens * (widest + 8 * shape.hidden_size) * size
    scratch = model.skeleton.kernels.scratch_elements(shape.mixers, buckets.max_tokens, session_len)
    widened = (WIDENED_AT_ONCE * model.skeleton.widened_elements + scratch) * size
    images = 0 if vision is None else _image_bytes(vision, buckets, shape.hidden_size, size, mesh)
    states = state_bytes(layout, model.dtype, buckets.max_batch_size + kept_states + 1)
    logits = 6 * buckets.max_batch_size * shape.vocab_size * 4  # several f32 copies, and the histories
    return plan_memory(
        layout,
        page_bytes(layout.paged, model.dtype, mesh.devices.size),
        share=config.cache_max_entry_count,
        free=free,
        reserved=activations + logits + widened + _states_in_hand(layout, buckets, size),
        images=images,
        states=states,
        session_len=session_len,
        sequences=buckets.max_batch_size,
        on_cpu=mesh.devices.flat[0].platform == "cpu",
        gain=gain(layout.paged, model.dtype),
    )


def _states_in_hand(layout: CacheLayout, buckets: Buckets, itemsize: int) -> int:
    """What a step takes of the largest layer's states out of their slots, before and behind its tokens."""
    largest = max((kind.slot_bytes(itemsize) for kind in layout.states), default=0)
    return 2 * buckets.max_batch_size * largest


def _image_bytes(vision: LoadedVisionModel, buckets: Buckets, width: int, itemsize: int, mesh: Mesh) -> int:
    """What rows of images and the largest run of the encoder take, on each device the same."""
    from lmdeploy_jax.engine.core.encoder import run_bytes

    levels = 1 + len(vision.config.tower.deepstack)
    rows = levels * (buckets.image_rows + 1) * width * itemsize
    return mesh.devices.size * (rows + run_bytes(vision.config, buckets.encoder[-1], itemsize))


def kept_states(
    config: JaxEngineConfig, model: LoadedModel, buckets: Buckets, layout: CacheLayout, free: int
) -> range:
    """The rows of states behind prefixes, behind those of slots: as many as sequences that run at once, but a
    power of two where memory is short, since compiled programs know the number.
    """
    batch = buckets.max_batch_size
    if not config.enable_prefix_caching or model.config.depends_on_length or not layout.states:
        return range(batch, batch)
    most = int(KEPT_STATES * free // state_bytes(layout, model.dtype, 1))
    return range(batch, batch + min(batch, 1 << most.bit_length() >> 1))
