"""A quantised checkpoint as if it were a plain one: the tensors of each module are one float weight."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lmdeploy_jax.converters.formats import Quantisation
from lmdeploy_jax.converters.formats.on_load import RoundedTensor, is_linear
from lmdeploy_jax.converters.formats.parts import Parts
from lmdeploy_jax.converters.formats.scheme import is_float
from lmdeploy_jax.converters.formats.tensor import QuantTensor, dequantise
from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.keytable import Rule, has_place
from lmdeploy_jax.converters.layouts import Shape
from lmdeploy_jax.converters.published import HEAD
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.slicing import Index, as_ranges, sizes
from lmdeploy_jax.errors import CheckpointError, ConfigError

log = logging.getLogger("lmdeploy_jax")
FLOAT32 = np.dtype(np.float32)
CACHE_SCALE = re.compile(
    r".*\.(?:(?:k|v|q|kv|prob)_(?:scale|zero_point)|(?:k|v|qkv)_proj\.output_(?:scale|zero_point))"
)


class QuantReader:
    """A `CheckpointReader` whose quantised weights are read as float32, by slice.

    `tensors` are those weights, by the names that a plain checkpoint has for them.
    Raises CheckpointError where the tensors of a module are incomplete or do not fit each other.
    """

    def __init__(self, reader: TensorReader, quantisation: Quantisation) -> None:
        self._reader = reader
        self._quantisation = quantisation
        self._names: dict[str, None] = {}
        self.tensors: dict[str, QuantTensor] = {}
        modules = self._modules()
        round_all = quantisation.on_load and not modules
        cache_scales = []
        for name in reader.names():
            weight, role = self._place(name)
            if CACHE_SCALE.fullmatch(name):
                cache_scales.append(name)
            elif weight in modules and weight not in self._names:
                self._open(weight, modules[weight])
            elif role in ("", "weight") and weight not in self.tensors:
                self._names[name] = None
                if round_all and is_linear(name, reader.info(name)):
                    self._round(name)
        if quantisation.rounds_head:
            self._round_head()
        self._tell(cache_scales)

    @property
    def folder(self) -> Path:
        return self._reader.folder

    def names(self) -> tuple[str, ...]:
        """Every plain tensor's and every quantised weight's name, in file order."""
        return tuple(self._names)

    def info(self, name: str) -> TensorInfo:
        """As `CheckpointReader.info`; quantised weights are float32."""
        if name not in self.tensors:
            return self._reader.info(name)
        tensor = self.tensors[name]
        first = next(iter(tensor.parts.names.values()))
        return TensorInfo(tensor.shape, FLOAT32, self._reader.info(first).file, 0)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `CheckpointReader.read`."""
        if name not in self.tensors:
            return self._reader.read(name, index)
        return dequantise(self.tensors[name], *as_ranges(index, self.tensors[name].shape))

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """As `CheckpointReader.read_into`."""
        if name not in self.tensors:
            self._reader.read_into(name, index, out)
            return
        ranges = as_ranges(index, self.tensors[name].shape)
        if out.shape != sizes(ranges):
            raise ValueError(f"{name}: slice {index} of shape {sizes(ranges)} does not fit {out.shape}")
        np.copyto(out, dequantise(self.tensors[name], *ranges), casting="unsafe")

    def _modules(self) -> dict[str, dict[str, str]]:
        """The tensors of each quantised module: role -> name, by the name of its weight."""
        modules: dict[str, dict[str, str]] = {}
        for name in self._reader.names():
            weight, role = self._place(name)
            if role and CACHE_SCALE.fullmatch(name) is None:
                modules.setdefault(weight, {})[role] = name
        return {weight: names for weight, names in modules.items() if self._is_quantised(names)}

    def _place(self, name: str) -> tuple[str, str]:
        """The weight that a tensor belongs to and its role there; "" for a tensor of no weight."""
        joint, roles = self._quantisation.format.joint, self._quantisation.format.roles
        module, _, role = name.rpartition(joint)
        if role not in roles:
            return name, "weight" if name.endswith(".weight") else ""
        return f"{module}.weight", role

    def _is_quantised(self, names: dict[str, str]) -> bool:
        """A float weight is plain, even where there are scales of the activations that it is given."""
        stored = self._reader.info(names["weight"]).dtype if "weight" in names else np.dtype(np.uint8)
        rest = {role for role in names if not role.startswith(("weight_shape", "input_", "activation_"))}
        return rest != {"weight"} or not is_float(stored)

    def _open(self, weight: str, names: dict[str, str]) -> None:
        joint = self._quantisation.format.joint
        parts = Parts(self._reader, weight.removesuffix(".weight"), names, joint)
        packed = {"qweight", "weight_packed"} & names.keys()
        if packed and "weight" in names:
            raise CheckpointError(
                f"{self._reader.info(weight).file}: tensor {weight}: {names[packed.pop()]} holds the same "
                "weight, quantised; remove one of the two"
            )
        self.tensors[weight] = self._quantisation.format.open_tensor(parts, self._quantisation.settings)
        self._names[weight] = None

    def _round(self, name: str) -> None:
        parts, shape = (
            Parts(self._reader, name.removesuffix(".weight"), {"weight": name}),
            self.info(name).shape,
        )
        self.tensors[name] = RoundedTensor(parts, (shape[0], shape[1]))

    def _round_head(self) -> None:
        if HEAD not in self._names:
            raise ConfigError(
                f"{self._quantisation.settings.where}: lm_head_quantized is true, but {self.folder} has no "
                f"{HEAD}: the embedding is the head too, and stays as it is; leave lm_head_quantized out"
            )
        if HEAD not in self.tensors:
            self._round(HEAD)

    def _tell(self, cache_scales: list[str]) -> None:
        if cache_scales:
            log.info(
                "%s: %d scales of a quantised KV cache are left unread, the first of them %s: with "
                "quant_policy every token has its own",
                self.folder, len(cache_scales), cache_scales[0],
            )  # fmt: skip
        if not self.tensors:
            log.warning(
                "%s asks for %s, but no tensor of the checkpoint is quantised: it is loaded as it is",
                self._quantisation.settings.where, self._quantisation.settings.method,
            )  # fmt: skip


def without_zero_biases(
    rules: Sequence[Rule], reader: QuantReader, names: Sequence[str], shapes: Mapping[str, Shape]
) -> list[str]:
    """The names without those of biases that are all 0 and that the model does not have.

    AutoGPTQ gave every layer that it quantised a bias.
    """
    extra = {
        name
        for name in names
        if name.endswith(".bias")
        and f"{name.removesuffix('bias')}weight" in reader.tensors
        and not has_place(rules, name, shapes)
    }
    return [name for name in names if name not in extra or reader.read(name).any()]
