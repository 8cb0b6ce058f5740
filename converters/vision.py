"""A checkpoint folder -> a vision model's weights on devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lmdeploy_jax.converters.device import load_leaves
from lmdeploy_jax.converters.folded_norms import norm_shapes, norms_folded
from lmdeploy_jax.converters.keytable import bind
from lmdeploy_jax.converters.layer_scale import folded, scale_shapes
from lmdeploy_jax.converters.load import pick_dtype, stored_dtype
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.families import VisionFamily
from lmdeploy_jax.vision.model import VisionModel


@dataclass(frozen=True)
class LoadedVisionModel:
    """A vision model and its weights as a flat tuple, the form in which compiled programs take them."""

    family: VisionFamily
    config: VisionModelConfig
    graphdef: nnx.GraphDef
    treedef: Any
    leaves: tuple[jax.Array, ...]

    def merge(self, leaves: tuple[jax.Array, ...]) -> VisionModel:
        """The model that holds `leaves`; to be called inside `jax.jit`."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def load_vision(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    backend: str = "xla",
    fused: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
) -> LoadedVisionModel:
    """Reads tower and projector onto the mesh's devices (default: JAX's first), each of which holds them
    whole.

    fused: norms and residual sums go into products where `TowerConfig.fusable`. `dtype`, `backend` and
    `hf_overrides` as in `load_model`. Raises CheckpointError and ConfigError.
    """
    family, config = read_vision(folder, hf_overrides)
    config = replace(config, tower=replace(config.tower, fused=fused and config.tower.fusable))
    sharding = _whole(mesh)
    platform = (jax.devices() if mesh is None else list(mesh.devices.flat))[0].platform
    wanted = pick_dtype(dtype, stored_dtype(folder), platform)
    abstract = nnx.eval_shape(lambda: VisionModel(config, dtype=wanted, backend=backend))
    graphdef, state = nnx.split(abstract)
    specs = _specs(state, sharding)
    with CheckpointReader(folder) as reader:
        rules = family.rules(config, reader.names())
        scales = scale_shapes(config.tower)
        stored = {name: spec.shape for name, spec in specs.items() if not name.endswith(".column_sums")}
        leaves = bind(rules, reader, stored | scales | norm_shapes(config.tower))
        for leaf in leaves.values():
            leaf.check_dtypes(wanted)
        arrays = load_leaves(norms_folded(folded(leaves, scales), config.tower, wanted), specs)
    return LoadedVisionModel(
        family, config, graphdef, jax.tree.structure(state), tuple(arrays[name] for name in specs)
    )


def _whole(mesh: Mesh | None) -> jax.sharding.Sharding:
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())


def _specs(state: nnx.State, sharding: jax.sharding.Sharding) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Name -> shape, dtype and place of each leaf, in the order of the leaves."""
    variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    specs = {}
    for path, variable in variables:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        specs[name] = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
    return specs
