"""A plain checkpoint as it is quantised: the weights of its decoder by layer, and all that is only copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import jax.numpy as jnp

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.config import read_json
from lmdeploy_jax.converters.families import build_config, family_of
from lmdeploy_jax.converters.formats import recognise
from lmdeploy_jax.converters.keytable import Leaf, bind
from lmdeploy_jax.converters.load import build_skeleton
from lmdeploy_jax.converters.published import names_read, settle_head
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.stacked import StackedReader
from lmdeploy_jax.converters.text_part import TextPartReader, text_part
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.kernels import Kernels

EMBEDDING = "embedding.weight"
ORIGINAL = "give the original checkpoint, in 16 or 32 bits"


@dataclass(frozen=True)
class Source:
    """An open checkpoint. `raw` is its config.json, `leaves` the decoder's weights, bound but not read."""

    raw: Mapping[str, Any]
    config: DecoderConfig
    files: CheckpointReader
    leaves: Mapping[str, Leaf]
    text: TextPartReader | None = None
    """Where the language model is a part of the checkpoint: its tensors by the names that they have alone."""
    stacked: StackedReader | None = None
    """Where experts may be held in one tensor: single ones by names of their own."""
    layers: tuple[Mapping[str, Leaf], ...] = field(init=False)
    """The weights of each layer, by the names that they have within it."""
    outer: tuple[str, ...] = field(init=False)
    """Names in the checkpoint of the tensors of no layer, which are copied as they are."""

    def __post_init__(self) -> None:
        count = len(self.config.layers)
        object.__setattr__(self, "layers", tuple(self._layer(i) for i in range(count)))
        within = {self.holder(name) for i in range(count) for name in self.tensors(i)}
        outer = tuple(name for name in self.files.names() if name not in within)
        object.__setattr__(self, "outer", outer)

    def _layer(self, index: int) -> dict[str, Leaf]:
        prefix = f"layers.{index}."
        return {
            name.removeprefix(prefix): leaf for name, leaf in self.leaves.items() if name.startswith(prefix)
        }

    def tensors(self, index: int) -> list[str]:
        """The names of a layer's tensors, as its weights have them."""
        return [name for leaf in self.layers[index].values() for name in leaf.names.values()]

    def reader(self, name: str) -> TensorReader:
        """What reads a tensor of a layer, by the name that its weight has for it, or any of the others."""
        return self.files if name in self.files else self.stacked or self.text or self.files

    def holder(self, name: str) -> str:
        """The tensor of the checkpoint that holds a weight's tensor."""
        name = name if self.stacked is None else self.stacked.holder(name)
        return name if self.text is None else self.text.whole_name(name)

    def written(self, name: str) -> str:
        """What a weight's tensor is called in the checkpoint that is written: as in this one, or where it was
        stacked with others, as it would be called if it were not.
        """
        if self.text is None:
            return name
        inner = name if self.stacked is None else self.stacked.holder(name)
        whole = self.text.whole_name(inner)
        alike = (one == other for one, other in zip(reversed(inner), reversed(whole), strict=False))
        shared = sum(1 for _ in takewhile(bool, alike))
        return whole[: len(whole) - shared] + name[len(inner) - shared :]


def open_source(folder: str | os.PathLike[str]) -> Source:
    """Opens and checks a checkpoint folder. Raises ConfigError where it is quantised or converted already,
    CheckpointError and UnsupportedModelError as loading does.
    """
    whole, path = read_json(folder, None)
    raw, where = text_part(whole, path)
    if (found := recognise(raw, where, folder)) is not None:
        raise ConfigError(f"{folder}: is quantised already, in {found.settings.method}; {ORIGINAL}")
    if orbax.is_converted(folder):
        raise ConfigError(f"{folder}: was written by `convert`, whose weights are fused; {ORIGINAL}")
    family, config, files = family_of(raw, where), build_config(raw, where), CheckpointReader(folder)
    text = None if raw is whole else TextPartReader(files)
    reader: TensorReader = text or files
    stacked = None if family.stacked is None else StackedReader(reader, family.stacked)
    reader, dtype = stacked or reader, jnp.dtype("float32")
    names = names_read(reader, len(config.layers))
    config, rules = settle_head(config, family.rules(config, 1), reader, names, dtype)
    shapes = {name: spec.shape for name, spec in build_skeleton(config, dtype, Kernels()).specs.items()}
    return Source(whole, config, files, bind(rules, reader, shapes, names), text, stacked)
