"""One layer of a decoder, alone: its linear layers, and what windows of tokens make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from lmdeploy_jax.cache.kinds import SharedCache, StateCache
from lmdeploy_jax.cache.pages import PAGE_SIZE, pages_for
from lmdeploy_jax.errors import UnsupportedModelError
from lmdeploy_jax.lite.statistics import InputStatistics, observe, observe_experts
from lmdeploy_jax.models.batch import AttentionMetadata
from lmdeploy_jax.models.config import DecoderConfig, LayerConfig, MixerConfig
from lmdeploy_jax.models.decoder import DecoderLayer
from lmdeploy_jax.models.kernels import Kernels, LayerCache
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.mixture import ExpertLinear
from lmdeploy_jax.models.norm import Norm
from lmdeploy_jax.models.projections import ColumnParallelLinear, RowParallelLinear
from lmdeploy_jax.models.rope import Rotation, rotation
from lmdeploy_jax.models.step_cache import Where
from lmdeploy_jax.pallas_kernels.grouped_matmul.groups import RowGroups
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, tile_rows
from lmdeploy_jax.pallas_kernels.spans import ragged_spans

Found = dict[str, InputStatistics]


@dataclass(frozen=True)
class Windows:
    """Sequences of equally many tokens, packed one after another: what a layer is given at a time."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


class LayerModel:
    """The layers of a decoder that are alike, without their weights."""

    def __init__(self, model: DecoderConfig, layer: LayerConfig, dtype: Any, kernels: Kernels) -> None:
        self.model, self.config, self.kernels = model, layer, kernels
        how: dict[str, Any] = {"dtype": dtype, "kernels": kernels}
        abstract = nnx.eval_shape(lambda: DecoderLayer(model, layer, **how))
        self._graph, state = nnx.split(abstract)
        self._tree = jax.tree.structure(state)
        variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        self.dtypes = {_name(path): variable.dtype for path, variable in variables}
        modules = nnx.iter_graph(abstract)
        self.linears: dict[str, Linear] = {
            ".".join(map(str, path)): module for path, module in modules if isinstance(module, Linear)
        }
        """By the name of the module, those that may be quantised."""

    @cached_property
    def observed(self) -> tuple[str, ...]:
        """The linear layers whose inputs are seen."""
        kinds = ColumnParallelLinear, RowParallelLinear, ExpertLinear
        return tuple(sorted(name for name, linear in self.linears.items() if isinstance(linear, kinds)))

    def check_runs(self, name: str) -> None:
        """Raises UnsupportedModelError, of the model `name`, where a layer does not run alone."""
        shared = any(isinstance(mixer.cache(1), SharedCache) for mixer in self.config.mixers)
        if shared or self.config.per_layer_input is not None:
            what = "keys and values of another" if shared else "inputs beside the residual stream"
            raise UnsupportedModelError(
                f"{name}: its layers read {what}, so that they cannot be calibrated one at a time; "
                "take `lite fp8`, or --calib-samples 0"
            )

    def run(
        self, leaves: Mapping[str, Array], x: Float[Array, "T E"], windows: Windows
    ) -> tuple[Float[Array, "T E"], Found]:
        """The residual stream behind the layer, and what its linear layers were given, by their names."""
        return self._run(tuple(leaves[name] for name in self.dtypes), x, windows.count)

    @cached_property
    def _run(self) -> Any:
        return jax.jit(self._compute, static_argnums=2)

    def _compute(self, leaves: tuple[Array, ...], x: Array, count: int) -> tuple[Array, Found]:
        layer: DecoderLayer = nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))
        found: Found = {}
        for name in self.observed:
            parent, _, attribute = name.rpartition(".")
            owner = _module(layer, parent)
            setattr(owner, attribute, _Observed(getattr(owner, attribute), name, found, self.kernels))
        windows = Windows(count, len(x) // count)
        seen = [self._cache(mixer, windows, x.dtype) for mixer in self.config.mixers]
        caches, where = tuple(cache for cache, _ in seen), tuple(place for _, place in seen)
        out, delta, *_ = layer(x, None, caches, where, self._rotation(windows), None)
        return (out if delta is None else self.kernels.add_norm(out, delta, None)[0]), found

    def _rotation(self, windows: Windows) -> Rotation | None:
        rope = None if self.config.mixer is None else self.config.mixer.rope
        if rope is None:
            return None
        positions = jnp.tile(jnp.arange(windows.length, dtype=jnp.int32), windows.count)
        lengths = jnp.full(windows.tokens, windows.length, jnp.int32)
        return rotation(rope, jnp.tile(positions, (3, 1)) if rope.mrope_section else positions, lengths)

    def _cache(self, mixer: MixerConfig, windows: Windows, dtype: Any) -> tuple[LayerCache, Where]:
        """An empty cache of one mixer, and where it finds the windows."""
        kind, rows = mixer.cache(1), np.arange(windows.count, dtype=np.int32)
        tiles = self._tiles(windows)
        if isinstance(kind, StateCache):
            shapes = zip(kind.shapes(windows.count + 1), (dtype, jnp.float32), strict=False)
            return tuple(jnp.zeros(*each) for each in shapes), ragged_spans(jnp.asarray(rows), tiles)
        assert not isinstance(kind, SharedCache)
        each = pages_for(windows.length)
        table = 1 + np.arange(windows.count * each, dtype=np.int32).reshape(windows.count, each)
        positions = np.arange(windows.length)
        slots = table[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        lengths = jnp.full(windows.count, windows.length, jnp.int32)
        metadata = AttentionMetadata(
            jnp.asarray(slots.reshape(-1), jnp.int32), jnp.asarray(table), lengths, tiles
        )
        arrays = tuple(jnp.zeros(shape, dtype) for shape in kind.shapes(table.size + 1))
        return (*arrays, jnp.zeros((windows.count, arrays[0].shape[1]), jnp.int32)), metadata

    def _tiles(self, windows: Windows) -> Array:
        height, rows = tile_rows(self.kernels.backend), np.arange(windows.count)
        counts, starts = np.full(windows.count, windows.length), rows * windows.length
        width = max_tiles(windows.tokens, windows.count, height)
        return jnp.asarray(build_tiles(rows, starts, counts, 0 * rows, height, width))


@cache
def layer_model(model: DecoderConfig, layer: LayerConfig, dtype: Any, kernels: Kernels) -> LayerModel:
    """The one `LayerModel` of these, so that layers alike are compiled once."""
    return LayerModel(model, layer, dtype, kernels)


class _Observed:
    """In the place of a linear layer: the same product, of which the inputs are noted down."""

    def __init__(self, linear: Any, name: str, found: Found, kernels: Kernels) -> None:
        self._linear, self._name, self._found, self._kernels = linear, name, found, kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linear, name)

    def __call__(self, x: Array, *rest: Any, **how: Any) -> Any:
        if isinstance(self._linear, ExpertLinear):
            return self._experts(x, *rest, **how)
        if isinstance(self._linear, ColumnParallelLinear):
            return self._column(x, *rest)
        self._found[self._name] = observe(x.reshape(len(x), -1))
        return self._linear(x)

    def unscaled(self, x: Array, delta: Array | None, norm: Norm | None) -> tuple[Array, Array, None]:
        """As `ColumnParallelLinear.unscaled`, of a product whose norm is apart and therefore seen."""
        return *self._column(x, delta, norm), None

    def rounded(self, x: Array, delta: Array | None, norm: Norm | None, reader: Any) -> tuple[Array, Array]:
        """As `ColumnParallelLinear.rounded`, of a product whose reader is seen too."""
        return self._column(x, delta, norm)

    def _column(self, x: Array, delta: Array | None, norm: Norm | None) -> tuple[Array, Array]:
        x, normed = self._kernels.add_norm(x, delta, norm)
        self._found[self._name] = observe(normed)
        return x, self._linear(normed, None, None)[1]

    def _experts(self, rows: Array, groups: RowGroups, **how: Any) -> Array:
        self._found[self._name] = observe_experts(rows, groups, self._linear.weight.shape[0])
        return self._linear(rows, groups, **how)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _module(layer: nnx.Module, path: str) -> Any:
    found: Any = layer
    for key in filter(None, path.split(".")):
        found = getattr(found, key)
    return found
