"""Where channels can be scaled without changing what a layer computes, and the scales of AWQ and SmoothQuant.

What enters some linear layers is divided by a scale a channel, in whatever makes it (a norm's weight, rows of
a linear layer), and the columns of all that reads it are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from lmdeploy_jax.lite.weights import WEIGHT, LayerWeights, Matrix
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig, LatentConfig, LayerConfig, MixerConfig
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig
from lmdeploy_jax.models.recurrent_config import DeltaConfig, Mamba2Config

LEAST = 1e-4  # of a scale, and of what one is divided by: channels without inputs or weights have some too


class Origin(Protocol):
    """What makes the inputs of linear layers."""

    def divide(self, weights: LayerWeights, scales: Float32[Array, "*X K"]) -> Float32[Array, "*X K"]:
        """Makes inputs that are divided by `scales`, or by what can be had of them, which is returned."""


@dataclass(frozen=True)
class NormOrigin:
    """The norm `name`, whose weight is applied plus `offset`."""

    name: str
    offset: float = 0.0

    def divide(self, weights: LayerWeights, scales: Float32[Array, "*X K"]) -> Float32[Array, "*X K"]:
        """As the dtype of the norm's tensor has it, so that nothing is lost by rounding it."""
        name = self.name + WEIGHT
        before = weights.wide(name) + self.offset
        after = weights.stored(name, before / scales - self.offset)
        weights.put(name, after)
        made = (before != 0) & (after + self.offset != 0)
        had = jnp.where(made, before / jnp.where(made, after + self.offset, 1), 1)
        if (bias := self.name + ".bias") in weights.leaves:
            weights.put(bias, weights.stored(bias, weights.wide(bias) / had))
        return had


@dataclass(frozen=True)
class RowsOrigin:
    """The last of the outputs along `axis` of the linear layer `module`: the values of heads, the half of a
    gated block that is not activated.
    """

    module: str
    axis: int

    def divide(self, weights: LayerWeights, scales: Float32[Array, "*X K"]) -> Float32[Array, "*X K"]:
        linear = weights.model.linears[self.module]
        out = linear.weight.shape[: linear.out_axes]
        last = (slice(None),) * self.axis + (-1,)
        rows = jnp.ones(out).at[last].set(1 / scales.reshape(jnp.ones(out)[last].shape))
        weights.scale_rows(self.module + WEIGHT, rows)
        if (bias := self.module + ".bias") in weights.leaves:
            weights.scale_rows(bias, rows)
        return scales


@dataclass(frozen=True)
class Scaling:
    """Linear layers `readers` that read what `origin` makes, and other weights that do."""

    origin: Origin
    readers: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def by_expert(self) -> bool:
        """Whether each of a mixture's experts has scales of its own."""
        return isinstance(self.origin, RowsOrigin) and ".experts." in self.origin.module

    def fold(self, weights: LayerWeights, scales: Float32[Array, "*X K"]) -> None:
        """What they read is divided by `scales`, and their columns are multiplied by it."""
        had = self.origin.divide(weights, scales)
        for name in (*(reader + WEIGHT for reader in self.readers), *self.others):
            weights.scale_columns(name, had)


def scalings(model: DecoderConfig, layer: LayerConfig) -> Iterator[Scaling]:
    """Those of a layer. None goes through a norm behind a block, or where query heads share values."""
    offset = 0.0 if model.norm == "layer" else model.norm_offset
    mixed, mixed_others = _mixer_readers(layer.mixer, "attention")
    if layer.second_mixer is not None:
        readers, others = _mixer_readers(layer.second_mixer, "second_mixer")
        mixed, mixed_others = mixed + readers, mixed_others + others
    fed, fed_others = _mlp_readers(layer.mlp)
    if layer.parallel:
        mixed, mixed_others = mixed + fed, mixed_others + fed_others
    if layer.pre_norm and mixed:
        yield Scaling(NormOrigin("attention_norm", offset), mixed, mixed_others)
    if layer.pre_norm and fed and not layer.parallel:
        yield Scaling(NormOrigin("mlp_norm", offset), fed, fed_others)
    yield from _within_mixer(layer.mixer)
    yield from _within_mlp(layer.mlp, offset)


Readers = tuple[tuple[str, ...], tuple[str, ...]]


def _mixer_readers(mixer: MixerConfig | None, name: str) -> Readers:
    """Which linear layers read what a mixer is given, and which other weights."""
    if mixer is None:
        return (), ()
    if isinstance(mixer, AttentionConfig):
        return (f"{name}.qkv",), ()
    if isinstance(mixer, LatentConfig):
        return ((f"{name}.q",), (f"{name}.kv_a.weight",)) if mixer.query_rank is None else ((), ())
    if isinstance(mixer, DeltaConfig):
        return (f"{name}.qkvz", f"{name}.ba"), ()
    return (f"{name}.xbczdt" if isinstance(mixer, Mamba2Config) else f"{name}.bcx",), ()


def _mlp_readers(mlp: MlpConfig | MixtureConfig | None) -> Readers:
    if mlp is None:
        return (), ()
    if isinstance(mlp, MlpConfig):
        return (_first(mlp, "mlp"),), ()
    shared = () if mlp.shared is None else (_first(mlp.shared, "mlp.shared"),)
    if mlp.beside:
        return shared, ()
    others = ["mlp.router.weight", *["mlp.shared_gate.weight"] * mlp.shared_gate]
    if mlp.latent_size:
        return shared, (*others, "mlp.into_latent.weight")
    return ("mlp.experts.gate_up", *shared), tuple(others)


def _first(mlp: MlpConfig, name: str) -> str:
    return f"{name}.gate_up" if mlp.gated else f"{name}.up"


def _within_mixer(mixer: MixerConfig | None) -> Iterator[Scaling]:
    if isinstance(mixer, LatentConfig) and mixer.query_rank is not None:
        yield Scaling(NormOrigin("attention.q_a_norm"), ("attention.q_b",))
    if isinstance(mixer, AttentionConfig) and mixer.group == 1 and mixer.own_rows == 2 and not mixer.v_norm:
        yield Scaling(RowsOrigin("attention.qkv", 1), ("attention.o",))


def _within_mlp(mlp: MlpConfig | MixtureConfig | None, offset: float) -> Iterator[Scaling]:
    if isinstance(mlp, MlpConfig):
        yield from _gated(mlp, "mlp", 0)
    if isinstance(mlp, MixtureConfig):
        if mlp.beside:
            yield Scaling(NormOrigin("mlp.experts_norm", offset), ("mlp.experts.gate_up",))
        yield from _gated(mlp.expert, "mlp.experts", 1)
        if mlp.shared is not None:
            yield from _gated(mlp.shared, "mlp.shared", 0)


def _gated(mlp: MlpConfig, name: str, axis: int) -> Iterator[Scaling]:
    """swigluoai adds 1 to what is not activated."""
    if mlp.gated and mlp.activation != "swigluoai":
        yield Scaling(RowsOrigin(f"{name}.gate_up", axis), (f"{name}.down",))


# --- The scales ---------------------------------------------------------------------------------------------


def importance(matrices: Sequence[Matrix], group: int | None) -> Float32[Array, "K"]:
    """Of each channel, the mean over all rows of |w|, relative to the largest in its group of columns."""
    rows = sum(len(matrix.weight) for matrix in matrices)
    return sum((_importance(matrix.weight, group) for matrix in matrices), jnp.zeros(())) / rows


@partial(jax.jit, static_argnums=1)
def _importance(weight: Float32[Array, "N K"], group: int | None) -> Float32[Array, "K"]:
    size = jnp.abs(weight)
    grouped = size.reshape(len(size), -1, group or size.shape[1])
    return (grouped / jnp.maximum(grouped.max(-1, keepdims=True), 1e-12)).reshape(size.shape).sum(0)


@jax.jit
def scales_at(
    ratio: Float32[Array, ""], inputs: Float32[Array, "K"], weights: Float32[Array, "K"]
) -> Float32[Array, "K"]:
    """inputs^ratio / weights^(1 - ratio), as far below 1 at the least as above it at the most."""
    scales = jnp.maximum(inputs**ratio / jnp.maximum(weights ** (1 - ratio), LEAST), LEAST)
    return scales / jnp.sqrt(scales.max() * scales.min())
