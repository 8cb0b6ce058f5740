"""Which linear layers of a checkpoint are quantised, told before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lmdeploy_jax.converters.formats.scheme import is_float
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.lite.layer import LayerModel, layer_model
from lmdeploy_jax.lite.methods import Method
from lmdeploy_jax.lite.source import EMBEDDING, Source
from lmdeploy_jax.lite.weights import WEIGHT, is_quantisable, tensor_rows
from lmdeploy_jax.models.config import MixtureConfig
from lmdeploy_jax.models.kernels import Kernels

LEAST_OUTPUTS = 8  # of a linear layer that is quantised: smaller ones gain nothing
HEAD = "lm_head"
GROUPS = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Plan:
    """What `method` does to the layers of `source`, and the layers' models on JAX's first device."""

    source: Source
    method: Method

    @cached_property
    def dtype(self) -> Any:
        """Of activations: a CPU's products are fastest in float32."""
        return jnp.dtype("bfloat16" if jax.default_backend() == "gpu" else "float32")

    @cached_property
    def models(self) -> list[LayerModel]:
        """Of each layer."""
        config = self.source.config
        mixtures = any(isinstance(layer.mlp, MixtureConfig) for layer in config.layers)
        # Kernels of experts do not show what each one is given.
        kernels = Kernels("pallas" if jax.default_backend() == "gpu" and not mixtures else "xla")
        return [layer_model(config, layer, self.dtype, kernels) for layer in config.layers]

    @cached_property
    def targets(self) -> list[list[str]]:
        """The linear layers that are quantised, of each layer."""
        return [
            [module for module in self._candidates(i) if self._fits(i, module)]
            for i in range(len(self.models))
        ]

    def _candidates(self, index: int) -> list[str]:
        model = self.models[index]
        return list(model.observed) if self.method.calibrates else sorted(model.linears)

    def _fits(self, index: int, module: str) -> bool:
        leaves = self.source.layers[index]
        if not is_quantisable(self.models[index], leaves, module):
            return False
        sizes = [len(rows) for rows in tensor_rows(leaves[module + WEIGHT].assembly).values()]
        return min(sizes) >= LEAST_OUTPUTS and not any(size % self.method.layout.outputs for size in sizes)

    @cached_property
    def plain_modules(self) -> list[str]:
        """Names in the checkpoint of the linear layers that stay as they are."""
        source, quantised = self.source, set(self._quantised())
        within = [name for i in range(len(self.models)) for name in source.tensors(i)]
        left = [source.written(name) for name in within if name not in quantised and self._is_linear(name)]
        skipped = set(source.leaves[EMBEDDING].names.values())
        left += [name for name in source.outer if name not in skipped and self._is_linear(name)]
        return list(dict.fromkeys([*(name.removesuffix(WEIGHT) for name in left), HEAD]))

    def _is_linear(self, name: str) -> bool:
        info = self.source.reader(name).info(name)
        matrix = len(info.shape) == 2 and is_float(info.dtype)
        return matrix and name.endswith(WEIGHT) and "embed" not in name

    def _quantised(self) -> Iterator[str]:
        for leaves, targets in zip(self.source.layers, self.targets, strict=True):
            for module in targets:
                yield from leaves[module + WEIGHT].names.values()

    def check(self) -> None:
        """Raises ConfigError where the columns of a linear layer do not divide into groups."""
        group = self.method.group
        for i, targets in enumerate(self.targets if group is not None else []):
            for module in targets:
                width = self._columns(i, module)
                if width % (group or width):
                    fits = next((size for size in GROUPS if width % size == 0), width)
                    raise ConfigError(
                        f"--w-group-size {group} does not divide the {width} inputs of {module} in layer {i}"
                        f"; take {fits}"
                    )

    def check_runs(self, name: str) -> None:
        """Raises UnsupportedModelError, of the model `name`, where a layer does not run alone."""
        for model in self.models:
            model.check_runs(name)

    def _columns(self, index: int, module: str) -> int:
        sources = self.source.layers[index][module + WEIGHT].assembly.sources
        return prod(next(iter(sources.values()))[1:])
