"""The one decoder-only transformer; `DecoderConfig` says which features it has."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from lmdeploy_jax.cache.kv import KVCache
from lmdeploy_jax.models.attention import Attention
from lmdeploy_jax.models.batch import Batch
from lmdeploy_jax.models.config import (
    DecoderConfig,
    LatentConfig,
    LayerConfig,
    MixerConfig,
    MixtureConfig,
    RopeConfig,
)
from lmdeploy_jax.models.delta import GatedDeltaNet
from lmdeploy_jax.models.embedding import Embedding
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.latent import LatentAttention
from lmdeploy_jax.models.linear import param, soft_cap
from lmdeploy_jax.models.mamba import Mamba2
from lmdeploy_jax.models.mixture import Mixture, MixtureBesideMLP
from lmdeploy_jax.models.mlp import GatedMLP, PlainMLP, feed_forward
from lmdeploy_jax.models.norm import LayerNorm, Norm, RMSNorm
from lmdeploy_jax.models.per_layer_input import PerLayerInput, PerLayerInputs
from lmdeploy_jax.models.recurrent_config import DeltaConfig, Mamba2Config, ShortConvConfig
from lmdeploy_jax.models.residual import Delta, NextDelta, summed
from lmdeploy_jax.models.rope import Rotation, rotation
from lmdeploy_jax.models.score import ScoreHead
from lmdeploy_jax.models.short_conv import ShortConv
from lmdeploy_jax.models.step_cache import StepCache, Where
from lmdeploy_jax.sampling.sampler import greedy

# The residual stream, what is added to it next, the caches, and each token's experts where those are told.
LayerOutput = tuple[Float[Array, "T E"], NextDelta | None, tuple[LayerCache, ...], Int32[Array, "T k"] | None]


@runtime_checkable
class Mixer(Protocol):
    """What stands in attention's place in a layer, or attention itself."""

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        cache: LayerCache,
        where: Any,
        rope: Rotation | None,
        /,
    ) -> tuple[Float[Array, "T E"], NextDelta, LayerCache]:
        """See `Attention.__call__`; `where` is the step's sequences as it sees them."""


class DecoderLayer(nnx.Module):
    """A mixer, or two, and an MLP, each with its norms, added to the residual stream; either may lack."""

    def __init__(
        self, model: DecoderConfig, config: LayerConfig, *, dtype: jnp.dtype, kernels: Kernels
    ) -> None:
        def norm(present: bool) -> Norm | None:
            return _norm(model, dtype) if present else None

        mixes, feeds = config.mixer is not None, config.mlp is not None
        how: dict[str, Any] = {"added_plainly": config.added_plainly, "dtype": dtype, "kernels": kernels}
        self.parallel, self.reports_routes = config.parallel, model.reports_routes
        self.kernels = kernels
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm(config.pre_norm and mixes)
        self.attention = _mixer(model, config.mixer, **how)
        self.second_mixer = _mixer(model, config.second_mixer, **how)
        self.attention_post_norm = norm(config.post_norm and mixes)
        self.mlp_norm = norm(config.pre_norm and feeds and not config.parallel)
        self.mlp = _feed_forward(model, config, **how)
        self.mlp_post_norm = norm(config.post_norm and feeds)
        given = config.per_layer_input
        self.per_layer_input = None if given is None else PerLayerInput(model, given, dtype=dtype)
        self.layer_scalar = param((1,), dtype, (None,)) if config.layer_scalar else None

    def __call__(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        caches: tuple[LayerCache, ...],
        where: tuple[Where, ...],
        rope: Rotation | None,
        given: Float[Array, "T P"] | None,
    ) -> LayerOutput:
        """The residual stream x and what the layer before adds to it -> the same, and the caches.

        `caches` and `where` are a mixer's each, see `StepCache.of`. `given`: the tokens' inputs of this layer
        alone.
        """
        norm, experts = self.attention_norm, None
        if self.parallel and self.mlp is not None:
            x, normed = self.kernels.add_norm(x, delta, norm)
            _, mixed, caches = self._mix(normed, None, None, caches, where, rope)
            _, out, experts = self._routed(normed, None, None)
            return x, self._scaled(None, summed(mixed) + summed(out)), caches, experts
        if self.attention is not None:
            x, delta, caches = self._mix(x, delta, norm, caches, where, rope)
            delta = self._scaled(self.attention_post_norm, delta)
        if self.mlp is not None:
            x, delta, experts = self._routed(x, delta, self.mlp_norm)
            delta = self._scaled(self.mlp_post_norm, delta)
        if self.per_layer_input is None and self.layer_scalar is None:
            return x, delta, caches, experts
        return self._finished(self.kernels.add_norm(x, delta, None)[0], given), None, caches, experts

    def _routed(
        self, x: Float[Array, "T E"], delta: Delta | None, norm: Norm | None
    ) -> tuple[Array, NextDelta, Array | None]:
        """The MLP, and the tokens' experts where they are reported."""
        assert self.mlp is not None
        if self.reports_routes and isinstance(self.mlp, Mixture | MixtureBesideMLP):
            return self.mlp.routed(x, delta, norm)
        return *self.mlp(x, delta, norm), None

    def _finished(self, x: Float[Array, "T E"], given: Float[Array, "T P"] | None) -> Float[Array, "T E"]:
        """The residual stream, with what Gemma 4 does to all of it behind the MLP."""
        if self.per_layer_input is not None and given is not None:
            x = self.per_layer_input(x, given)
        return x if self.layer_scalar is None else x * self.layer_scalar[...]

    def _mix(
        self,
        x: Float[Array, "T E"],
        delta: Delta | None,
        norm: Norm | None,
        caches: tuple[LayerCache, ...],
        where: tuple[Where, ...],
        rope: Rotation | None,
    ) -> tuple[Float[Array, "T E"], NextDelta, tuple[LayerCache, ...]]:
        assert self.attention is not None
        if self.second_mixer is None:
            x, out, cache = self.attention(x, delta, norm, caches[0], where[0], rope)
            return x, out, (cache,)
        x, normed = self.kernels.add_norm(x, delta, norm)
        _, first, cache = self.attention(normed, None, None, caches[0], where[0], rope)
        _, second, states = self.second_mixer(normed, None, None, caches[1], where[1], None)
        return x, summed(first) + summed(second), (cache, states)

    def _scaled(self, post_norm: Norm | None, out: NextDelta) -> NextDelta:
        out = out if post_norm is None else post_norm(summed(out))
        return out if self.residual_multiplier == 1.0 else summed(out) * self.residual_multiplier


def _norm(model: DecoderConfig, dtype: jnp.dtype) -> Norm:
    """A norm of the residual stream."""
    if model.norm == "layer":
        return LayerNorm(model.hidden_size, model.norm_eps, bias=model.norm_bias, dtype=dtype, axis="embed")
    return RMSNorm(model.hidden_size, model.norm_eps, model.norm_offset, dtype=dtype, axis="embed")


def _mixer(model: DecoderConfig, config: MixerConfig | None, **how: Any) -> Mixer | None:
    if config is None:
        return None
    if isinstance(config, LatentConfig):
        return LatentAttention(model, config, **how)
    if isinstance(config, DeltaConfig):
        return GatedDeltaNet(model, config, **how)
    if isinstance(config, Mamba2Config):
        return Mamba2(model, config, **how)
    if isinstance(config, ShortConvConfig):
        return ShortConv(model, config, **how)
    return Attention(model, config, **how)


def _feed_forward(
    model: DecoderConfig, config: LayerConfig, **how: Any
) -> GatedMLP | PlainMLP | Mixture | MixtureBesideMLP | None:
    if config.mlp is None:
        return None
    if isinstance(config.mlp, MixtureConfig) and config.mlp.beside:
        return MixtureBesideMLP(model, config.mlp, dtype=how["dtype"], kernels=how["kernels"])
    if isinstance(config.mlp, MixtureConfig):
        return Mixture(model.hidden_size, config.mlp, **how)
    return feed_forward(model.hidden_size, config.mlp, **how)


def _score_head(config: DecoderConfig, dtype: jnp.dtype) -> ScoreHead | None:
    head = config.score
    return ScoreHead(config.hidden_size, head, dtype=dtype) if head and head.has_weights else None


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits; see `models.sharded` for several devices.

    Build it under `nnx.eval_shape` and fill the leaves from a checkpoint; its own initial values are zeros.
    """

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, kernels: Kernels) -> None:
        self.config = config
        self.dtype = dtype
        self.kernels = kernels
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, kernels=kernels)
        given = config.per_layer_input
        self.per_layer_inputs = (
            None if given is None else PerLayerInputs(config, given, dtype=dtype, kernels=kernels)
        )
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
        self.score = _score_head(config, dtype)

    def __call__(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T E"], KVCache]:
        """One forward pass -> hidden states after the final norm, the cache with the new tokens."""
        x, delta = self._embedded(batch)
        given = self._given(batch, x)
        step, rotations, first = StepCache(cache, batch), self._rotations(batch), 0
        routes: list[Array | None] = []
        for i, (layer, config) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            mixers = range(first, first + len(config.mixers))
            seen = [step.of(mixer) for mixer in mixers]
            caches, where = tuple(held for held, _ in seen), tuple(sequences for _, sequences in seen)
            rope = rotations[None if config.mixer is None else config.mixer.rope]
            own = None if given is None else given[:, i]
            x, delta, caches, experts = _run_layer(*nnx.split(layer), x, delta, caches, where, rope, own)
            for mixer, held in zip(mixers, caches, strict=True):
                step.put(mixer, held)
            x, first = _deepstack(x, batch, i + 1), mixers.stop
            routes.append(experts)
        hidden = self.kernels.add_norm(x, delta, self.norm)[1]
        return self._with_routes(hidden, routes) if self.config.reports_routes else hidden, step.cache

    def _embedded(self, batch: Batch) -> tuple[Float[Array, "T E"], Delta | None]:
        """The residual stream, and what devices have yet to add to it, where that is all they do to it."""
        multiplier = self.config.embedding_multiplier
        if multiplier == 1.0 and self.per_layer_inputs is None and batch.embeddings is None:
            shares = self.embedding.shares(batch.tokens)
            if shares is not None:
                return jnp.zeros(shares.parts.shape, self.dtype), shares
        x = self.embedding.lookup(batch.tokens)
        x = x if multiplier == 1.0 else x * jnp.asarray(multiplier, x.dtype)
        return _merged(x, batch), None

    def _given(self, batch: Batch, x: Float[Array, "T E"]) -> Float[Array, "T L P"] | None:
        """What each layer has of each token besides the residual stream."""
        config, tokens = self.config.per_layer_input, batch.tokens
        if self.per_layer_inputs is None or config is None:
            return None
        if batch.embedding_index is not None:
            tokens = jnp.where(batch.embedding_index < 0, tokens, config.pad_id)
        return self.per_layer_inputs(tokens, x)

    def _with_routes(
        self, hidden: Float[Array, "T E"], routes: list[Int32[Array, "T k"] | None]
    ) -> Float[Array, "T W"]:
        """See `DecoderConfig.reports_routes`; -1 in layers without experts."""
        none = jnp.full((hidden.shape[0], self.config.choices), -1, hidden.dtype)
        told = [
            none if experts is None else none.at[:, : experts.shape[1]].set(experts) for experts in routes
        ]
        return jnp.concatenate([hidden, *told], axis=1)

    def logits(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R V"]:
        """V is the vocabulary's size, without what pads it."""
        return finish_logits(self.config, self.head_product(hidden))

    def greedy(self, hidden: Float[Array, "R E"]) -> Int32[Array, "R"]:
        """The best token of each row; see `sampling.sampler.greedy`."""
        return greedy(self.logits(hidden))

    def scores(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R labels"]:
        """What a score head that has weights makes of hidden states."""
        assert self.score is not None
        return self.score(hidden[:, : self.config.hidden_size])

    def head_product(self, hidden: Float[Array, "R E"]) -> Float32[Array, "R rows"]:
        """The product with the rows of the head's table that are on this device."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return head.attend(hidden[:, : self.config.hidden_size] if self.config.reports_routes else hidden)

    def _rotations(self, batch: Batch) -> dict[RopeConfig | None, Rotation | None]:
        """The rotation of each kind of layers; those without one have None."""
        rotations: dict[RopeConfig | None, Rotation | None] = {
            rope: rotation(rope, batch.rope_positions, batch.rope_lens) for rope in self.config.ropes
        }
        rotations[None] = None
        return rotations


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
    caches: tuple[LayerCache, ...],
    where: tuple[Where, ...],
    rope: Rotation | None,
    given: Array | None,
) -> LayerOutput:
    """A jitted function of its own, so that layers alike are traced once; XLA inlines the calls."""
    return nnx.merge(graph, state)(x, delta, caches, where, rope, given)
