"""The one decoder-only transformer; `DecoderConfig` says which features it has."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32

from lmdeploy_jax.cache.kinds import StateCache
from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.models.attention import Attention
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.models.config import DecoderConfig, LatentConfig, LayerConfig, MixtureConfig, RopeConfig
from lmdeploy_jax.models.delta import GatedDeltaNet
from lmdeploy_jax.models.embedding import Embedding
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.latent import LatentAttention
from lmdeploy_jax.models.linear import soft_cap
from lmdeploy_jax.models.mixture import Mixture
from lmdeploy_jax.models.mlp import GatedMLP, PlainMLP
from lmdeploy_jax.models.norm import LayerNorm, Norm, RMSNorm
from lmdeploy_jax.models.recurrent_config import DeltaConfig
from lmdeploy_jax.models.rope import Rotation, rotation
from lmdeploy_jax.pallas_kernels.spans import Spans, decode_spans, ragged_spans

Where = AttentionMetadata | Spans  # a step's sequences, as layers with pages and those with a state see them


class Mixer(Protocol):
    """What stands in attention's place in a layer, or attention itself."""

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Float[Array, "*S T E"] | None,
        norm: Norm | None,
        cache: LayerCache,
        where: Any,
        rope: Rotation | None,
        /,
    ) -> tuple[Float[Array, "T E"], Float[Array, "*parts T E"], LayerCache]:
        """See `Attention.__call__`; `where` is the step's sequences as it sees them."""


class DecoderLayer(nnx.Module):
    """Attention and MLP, each with its norms, added to the residual stream."""

    def __init__(
        self, model: DecoderConfig, config: LayerConfig, *, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        def norm(present: bool) -> Norm | None:
            return _norm(model, dtype) if present else None

        self.parallel = config.parallel
        self.kernels = kernels
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm(config.pre_norm)
        self.attention = _mixer(model, config, dtype=dtype, kernels=kernels)
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm and not config.parallel)
        self.mlp = _feed_forward(model, config, dtype=dtype, kernels=kernels)
        self.mlp_post_norm = norm(config.post_norm)

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Float[Array, "*S T E"] | None,
        cache: LayerCache,
        metadata: Where,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], Float[Array, "*parts T E"], LayerCache]:
        """The residual stream x and what the layer before adds to it -> the same, and the cache."""
        if self.parallel:
            return self._in_parallel(x, delta, cache, metadata, rope)
        x, out, cache = self.attention(x, delta, self.attention_norm, cache, metadata, rope)
        x, out = self.mlp(x, self._scaled(self.attention_post_norm, out), self.mlp_norm)
        return x, self._scaled(self.mlp_post_norm, out), cache

    def _in_parallel(
        self,
        x: Float[Array, "T E"],
        delta: Float[Array, "*S T E"] | None,
        cache: LayerCache,
        metadata: Where,
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], Float[Array, "T E"], LayerCache]:
        x, normed = self.kernels.add_norm(x, delta, self.attention_norm)
        _, attended, cache = self.attention(normed, None, None, cache, metadata, rope)
        return x, self._scaled(None, attended + self.mlp(normed, None, None)[1]), cache

    def _scaled(self, post_norm: Norm | None, out: Array) -> Array:
        out = out if post_norm is None else post_norm(out)
        return out if self.residual_multiplier == 1.0 else out * self.residual_multiplier


def _norm(model: DecoderConfig, dtype: jnp.dtype) -> Norm:
    """A norm of the residual stream."""
    if model.norm == "layer":
        return LayerNorm(model.hidden_size, model.norm_eps, bias=model.norm_bias, dtype=dtype, axis="embed")
    return RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset, dtype=dtype, axis="embed")


def _mixer(model: DecoderConfig, config: LayerConfig, *, dtype: jnp.dtype, kernels: Kernels) -> Mixer:
    how: dict[str, Any] = {"added_plainly": config.added_plainly, "dtype": dtype, "kernels": kernels}
    if isinstance(config.mixer, LatentConfig):
        return LatentAttention(model, config.mixer, **how)
    if isinstance(config.mixer, DeltaConfig):
        return GatedDeltaNet(model, config.mixer, **how)
    return Attention(model, config.mixer, **how)


def _feed_forward(
    model: DecoderConfig, config: LayerConfig, *, dtype: jnp.dtype, kernels: Kernels
) -> GatedMLP | PlainMLP | Mixture:
    how: dict[str, Any] = {"added_plainly": config.added_plainly, "dtype": dtype, "kernels": kernels}
    if isinstance(config.mlp, MixtureConfig):
        return Mixture(model.hidden_size, config.mlp, **how)
    block = GatedMLP if config.mlp.gated else PlainMLP
    return block(model.hidden_size, config.mlp, **how)


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits; see `models.sharded` for several devices.

    Build it under `nnx.eval_shape` and fill the leaves from a checkpoint; its own initial values are zeros.
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, kernels: Kernels) -> None:
        self.config = config
        self.dtype = dtype
        self.kernels = kernels
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, kernels=kernels)
        self.layers = nnx.List(
            DecoderLayer(config, layer, dtype=dtype, kernels=kernels) for layer in config.layers
        )
        self.norm = _norm(config, dtype)
        sizes = (config.vocab_size, config.hidden_size)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Embedding(*sizes, bias=config.head_bias, dtype=dtype, kernels=kernels)
        )

    def __call__(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T E"], KVCache]:
        """One forward pass -> hidden states after the final norm, the cache with the new tokens."""
        x = self.embedding.lookup(batch.tokens)
        if self.config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        x, delta = _merged(x, batch), None
        counters = _split_counters(cache, len(batch.attention[0].kv_lens))
        spans = _spans(cache, batch) if cache.layout.states else None
        for i, (layer, rope) in enumerate(zip(self.layers, self._rotations(batch), strict=True)):
            graph, state = nnx.split(layer)
            group, held = cache.layout.places[i][0], cache.of_layer(i)
            if group is None:
                x, delta, held = _run_layer(graph, state, x, delta, held, spans, rope)
            else:
                metadata, heads = batch.attention[group], held[0].shape[1]
                args = (x, delta, (*held, counters[heads]), metadata, rope)
                x, delta, (*held, counters[heads]) = _run_layer(graph, state, *args)
            cache = cache.with_layer(i, tuple(held))
            x = _deepstack(x, batch, i + 1)
        return self.kernels.add_norm(x, delta, self.norm)[1], cache

    def logits(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R V"]:
        """V is the vocabulary's size, without what pads it."""
        return finish_logits(self.config, self.head_product(hidden))

    def head_product(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R rows"]:
        """The product with the rows of the head's table that are on this device."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return head.attend(hidden)

    def _rotations(self, batch: Batch) -> list[Rotation | None]:
        """Each layer's rotation; layers of one kind share it."""
        rotations: dict[RopeConfig | None, Rotation | None] = {
            rope: rotation(rope, batch.rope_positions, batch.rope_lens) for rope in self.config.ropes
        }
        rotations[None] = None
        return [rotations[layer.mixer.rope] for layer in self.config.layers]


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


def _merged(x: Array, batch: Batch) -> Array:
    """The tokens' embeddings [T, E], with those that the batch brings along in place of placeholders'."""
    if batch.embeddings is None or batch.embedding_index is None:
        return x
    index = batch.embedding_index
    return jnp.where(index[:, None] < 0, x, batch.embeddings[0, index].astype(x.dtype))


def _deepstack(x: Array, batch: Batch, level: int) -> Array:
    """The residual stream [T, E] after so many layers, with what the batch brings along for it."""
    if batch.embeddings is None or batch.embedding_index is None or level >= len(batch.embeddings):
        return x
    index = batch.embedding_index
    return x + jnp.where(index[:, None] < 0, 0, batch.embeddings[level, index].astype(x.dtype))


def finish_logits(config: DecoderConfig, product: Float32[Array, "R rows"]) -> Float32[Array, "R V"]:
    """The logits, of the head's product with all rows of its table, padding included."""
    return soft_cap(product[:, : config.vocab_size] * config.logit_multiplier, config.logit_soft_cap)


@partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef,
    state: nnx.State,
    x: Array,
    delta: Array | None,
    cache: LayerCache,
    metadata: Where,
    rope: Rotation | None,
) -> tuple[Array, Array, LayerCache]:
    """A jitted function of its own, so that layers alike are traced once; XLA inlines the calls."""
    return nnx.merge(graph, state)(x, delta, cache, metadata, rope)
