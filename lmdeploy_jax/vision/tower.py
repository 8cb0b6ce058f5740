"""The vision transformer (Dosovitskiy et al., 2021) of every family."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lmdeploy_jax.models.linear import param
from lmdeploy_jax.pallas_kernels.encoder_attention import encoder_attention, why_not_mosaic
from lmdeploy_jax.vision.attention import rotate, rotation
from lmdeploy_jax.vision.config import NormConfig, TowerConfig
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.layers import MLP, Dense, GatedMLP, PlainRMSNorm, make_norm, product
from lmdeploy_jax.vision.positions import coordinates, position_taps
from lmdeploy_jax.vision.processor import ImageProcessor

Rotation = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """What attention knows of patches: whose they are, how their heads turn.

    count: of each sequence, where padding stands behind them that their tensor cores want; None: there is
    none.
    """

    segments: Array | None
    turn: Rotation | None
    count: int | None = field(default=None, metadata={"static": True})


class TowerAttention(nnx.Module):
    """Multi-head attention, q, k and v in one product."""

    def __init__(self, config: TowerConfig, *, dtype: jnp.dtype, backend: str) -> None:
        heads, size, width = config.heads, config.head_dim, config.width
        self.backend = backend
        kind = partial(product(config.clipped), dtype=dtype, backend=backend)
        before = config.layer_norm_config() if config.fused else None
        self.qkv = kind((3, heads, size), (width,), bias=config.qkv_bias, norm=before)
        self.out = kind((width,), (heads, size), bias=config.out_bias)
        self.head_norms = config.head_norms
        norm = NormConfig(size if config.head_norms else width, "rms", config.norm_eps)
        normed = config.qk_norm or config.head_norms
        self.q_norm = make_norm(norm, dtype=dtype) if normed else None
        self.k_norm = make_norm(norm, dtype=dtype) if normed else None
        self.v_norm = PlainRMSNorm(config.norm_eps) if config.head_norms else None

    def __call__(self, x: Array, place: Places, residual: Array | None = None) -> Array:
        """x [B, N, E] -> the same."""
        batch, count, width = x.shape
        qkv = self.qkv(x.reshape(batch * count, width))
        qkv = qkv.reshape(batch, count, *qkv.shape[1:])
        if self.q_norm is not None or place.turn is not None:
            qkv = self._prepared(qkv, place.turn)
        attended = encoder_attention(qkv, place.segments, count=place.count, backend=self.backend)
        rows = None if residual is None else residual.reshape(batch * count, width)
        return self.out(attended.reshape(batch * count, *attended.shape[2:]), residual=rows).reshape(x.shape)

    def _prepared(self, qkv: Array, turn: Rotation | None) -> Array:
        """Normalised and turned."""
        q, k, v = self._normed(*(qkv[:, :, part] for part in range(3)))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return jnp.stack([q, k, v], axis=2)

    def _normed(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        if not self.head_norms:
            return _over_heads(self.q_norm, q), _over_heads(self.k_norm, k), v
        q, k, v = _applied(self.q_norm, q), _applied(self.k_norm, k), _applied(self.v_norm, v)
        return q * jnp.asarray(q.shape[-1] ** 0.5, q.dtype), k, v  # which `attend` divides by


def _over_heads(norm: nnx.Module | None, x: Array) -> Array:
    """Normalised over all heads together."""
    return x if norm is None else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class TowerLayer(nnx.Module):
    """Attention and MLP, each after a norm and added to what comes in."""

    def __init__(self, config: TowerConfig, *, dtype: jnp.dtype, backend: str) -> None:
        self.fused = config.fused
        self.attention_norm = None if config.fused else make_norm(config.norm_config(), dtype=dtype)
        self.attention = TowerAttention(config, dtype=dtype, backend=backend)
        self.mlp_norm = None if config.fused else make_norm(config.norm_config(), dtype=dtype)
        self.mlp = _mlp(config, dtype, backend)
        after = config.post_norms
        self.attention_post_norm = make_norm(config.norm_config(), dtype=dtype) if after else None
        self.mlp_post_norm = make_norm(config.norm_config(), dtype=dtype) if after else None

    def __call__(self, x: Array, place: Places) -> Array:
        """x [B, N, E] -> the same."""
        if self.fused:
            rows = self.attention(x, place, residual=x).reshape(-1, x.shape[-1])
            return self.mlp(rows, residual=rows).reshape(x.shape)
        x = x + _applied(self.attention_post_norm, self.attention(_applied(self.attention_norm, x), place))
        out = _applied(self.mlp_post_norm, self.mlp(_applied(self.mlp_norm, x).reshape(-1, x.shape[-1])))
        return x + out.reshape(x.shape)


def _mlp(config: TowerConfig, dtype: jnp.dtype, backend: str) -> nnx.Module:
    width, inner = config.width, config.mlp_width
    how: dict[str, Any] = {"bias": config.mlp_bias, "dtype": dtype, "backend": backend}
    if config.gated:
        return GatedMLP(width, inner, width, config.activation, clipped=config.clipped, **how)
    norm = config.layer_norm_config() if config.fused else None
    return MLP(width, inner, config.activation, norm, **how)


class Tower(nnx.Module):
    """Patches to features."""

    def __init__(
        self, config: TowerConfig, processor: ImageProcessor, *, dtype: jnp.dtype, backend: str
    ) -> None:
        self.config = config
        self.processor = processor
        self.backend = backend
        shape = config.patch_shape
        inner = (*shape[1:], shape[0]) if config.channels_last else shape
        self.patch = Dense((config.width,), inner, bias=config.patch_bias, dtype=dtype, backend=backend)
        self.class_token = param((1, 1, config.width), dtype, (None,) * 3) if config.class_token else None
        self.positions = _table(config, dtype)
        norm = config.norm_config()
        self.patch_norm = make_norm(norm, dtype=dtype) if config.patch_norm else None
        self.pre_norm = make_norm(norm, dtype=dtype) if config.pre_norm else None
        layer = partial(TowerLayer, config, dtype=dtype, backend=backend)
        self.layers = nnx.List(layer() for _ in range(config.layers))
        self.post_norm = make_norm(norm, dtype=dtype) if config.post_norm else None

    def __call__(self, inputs: VisionInputs) -> tuple[Array, list[Array]]:
        """-> features [B, N, E], and those of the layers in `TowerConfig.deepstack`."""
        x, taken = self._embedded(inputs), []
        x, place = self._padded(x, Places(inputs.segments, self._turn(inputs)))
        for number, layer in enumerate(self.layers):
            x = self._run(number, layer, x, place)
            if number in self.config.deepstack:
                taken.append(x[:, : place.count])
        x = x[:, 0 if self.class_token is None else 1 : place.count]
        return _applied(self.post_norm, x), taken

    def _padded(self, x: Array, place: Places) -> tuple[Array, Places]:
        """With rows behind each sequence where TMA reads multiples of eight."""
        count, segments = x.shape[1], place.segments is not None
        short = -count % 8
        plain = not short or why_not_mosaic(x.dtype, self.config.head_dim, segments=segments) is not None
        if self.backend != "mosaic" or plain or place.turn is not None:
            return x, place
        return jnp.pad(x, ((0, 0), (0, short), (0, 0))), replace(place, count=count)

    def _turn(self, inputs: VisionInputs) -> Rotation | None:
        if self.config.rotary is None:
            return None
        places = inputs.coordinates
        if places is None:  # views are squares of one size
            assert self.config.grid is not None
            places = jnp.asarray(coordinates(self.processor, self.config.grid, self.config.grid))[None]
        if self.class_token is not None:
            places = jnp.pad(places, ((0, 0), (1, 0), (0, 0)), constant_values=-1)
        return rotation(self.config.rotary, self.config.head_dim, places)

    def _run(self, number: int, layer: TowerLayer, x: Array, place: Places) -> Array:
        """One layer; where it looks no further than a window, windows are sequences of their own."""
        graph, state = nnx.split(layer)
        window = self.config.window
        if window is None or number in self.config.full_layers:
            return _run_layer(graph, state, x, place)
        cut = jax.tree.map(partial(_windows, window=window), (x, place))
        return _run_layer(graph, state, *cut).reshape(x.shape)

    def _embedded(self, inputs: VisionInputs) -> Array:
        x = self._normalised(inputs.patches)
        batch, count, _ = x.shape
        x = x.reshape(batch * count, *self.config.patch_shape)
        x = self.patch(jnp.moveaxis(x, 1, -1) if self.config.channels_last else x).reshape(batch, count, -1)
        x = _applied(self.patch_norm, x)
        if self.positions is not None:
            table = self.positions[...].reshape(-1, x.shape[-1])
            x = self._placed(x, table, inputs)
        return _applied(self.pre_norm, x)

    def _placed(self, x: Array, table: Array, inputs: VisionInputs) -> Array:
        """Positions added, and the class token before the patches."""
        if self.class_token is None:
            return x + self._positions(table, inputs).astype(x.dtype)
        assert self.config.positions is not None
        at = len(table) - 1 if self.config.positions.class_last else 0
        patches = table[:at] if at else table[1:]
        x = x + self._positions(patches, inputs).astype(x.dtype)
        first = self.class_token[...] + table[at : at + 1]
        return jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape[1:])), x], axis=1)

    def _normalised(self, patches: Array) -> Array:
        """Levels 0...255 [B, N, K] -> what the patch product takes, in the weights' dtype."""
        each = patches.shape[-1] // len(self.processor.mean)
        mean, std = (
            np.repeat(np.float32(255) * np.asarray(values, np.float32), each)
            for values in (self.processor.mean, self.processor.std)
        )
        return ((patches.astype(jnp.float32) - mean) / std).astype(self.patch.weight.dense().dtype)

    def _positions(self, table: Array, inputs: VisionInputs) -> Array:
        """Each patch's position, f32 [B, N, E] or [N, E], of a table [entries, E]."""
        taps, weights = inputs.taps, inputs.weights
        if taps is None or weights is None:
            taps, weights = self._view_taps()
        return (table[taps].astype(jnp.float32) * weights[..., None]).sum(axis=-2)

    def _view_taps(self) -> tuple[np.ndarray, np.ndarray]:
        """Of views that are squares of one size."""
        assert self.config.positions is not None
        assert self.config.grid is not None
        return position_taps(self.config.positions, self.processor, self.config.grid, self.config.grid)


@partial(jax.jit, static_argnums=0)
def _run_layer(graph: nnx.GraphDef, state: nnx.State, x: Array, place: Places) -> Array:
    """A jitted function of its own, so that layers alike are traced once; XLA inlines the calls."""
    return nnx.merge(graph, state)(x, place)


def _table(config: TowerConfig, dtype: jnp.dtype) -> nnx.Param | None:
    if config.positions is None:
        return None
    return param(config.positions.shape, dtype, (None,) * len(config.positions.shape))


def _applied(norm: nnx.Module | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _windows(x: Array, window: int) -> Array:
    """[1, N, ...] -> [N / window, window, ...]."""
    return x.reshape(-1, window, *x.shape[2:])
