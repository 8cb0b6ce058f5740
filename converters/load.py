"""A checkpoint folder -> a decoder's weights on devices."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from lmdeploy_jax.converters import orbax, random_weights
from lmdeploy_jax.converters.config import read_json
from lmdeploy_jax.converters.device import load_leaves
from lmdeploy_jax.converters.families import Family, build_config, family_of
from lmdeploy_jax.converters.formats import Quantisation, recognise
from lmdeploy_jax.converters.formats.leaves import held_leaves
from lmdeploy_jax.converters.formats.reader import QuantReader, without_zero_biases
from lmdeploy_jax.converters.formats.scheme import is_float
from lmdeploy_jax.converters.keytable import Leaf, bind
from lmdeploy_jax.converters.published import HEAD, names_read, settle_head
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.regroup import cuts_of, load_converted, widened
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.stacked import StackedReader
from lmdeploy_jax.converters.text_part import TextPartReader, text_part
from lmdeploy_jax.errors import CheckpointError, ConfigError
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.decoder import Decoder
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.linear import Linear
from lmdeploy_jax.models.quantised import hold_quantised
from lmdeploy_jax.models.sharded import AnyDecoder, ShardedDecoder
from lmdeploy_jax.models.tuning import UNTUNED, Tuning
from lmdeploy_jax.parallel.rules import sharding

log = logging.getLogger("lmdeploy_jax")
Progress = Callable[[int, int], None]
Merge = Callable[[tuple[jax.Array, ...]], Decoder]
SHARE_OF_MEMORY = 0.8  # of what is free, which widened weights may take
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Skeleton:
    """A decoder without its weights: what they are called and look like, and how to put it together."""

    config: DecoderConfig
    kernels: Kernels
    graphdef: nnx.GraphDef
    treedef: Any
    formats: Mapping[str, WeightFormat]
    """Name -> how it is held, of the weights that are quantised."""
    specs: Mapping[str, jax.ShapeDtypeStruct]
    """Name -> shape, dtype and sharding of each leaf, in the order of the leaves."""

    def merge(self, leaves: tuple[jax.Array, ...], peers: jax.Array | None = None) -> AnyDecoder:
        """The decoder that holds `leaves`; to be called inside `jax.jit`. `peers`: as several devices have
        them, see `parallel.peers`.
        """
        return self._sharded(self._local, leaves, range(len(leaves)), peers)

    def merge_head(self, leaves: tuple[jax.Array, ...]) -> AnyDecoder:
        """A decoder that can do `logits` and `scores` and no more, of the leaves at `head_places`."""
        return self._sharded(self._local_head, leaves, self.head_places)

    def _local(self, leaves: tuple[Any, ...]) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def _local_head(self, leaves: tuple[jax.Array, ...]) -> Decoder:
        places = dict(zip(self.head_places, leaves, strict=True))
        return self._local(tuple(places.get(i, spec) for i, spec in enumerate(self.specs.values())))

    def _sharded(
        self,
        local: Merge,
        leaves: tuple[jax.Array, ...],
        places: Sequence[int],
        peers: jax.Array | None = None,
    ) -> AnyDecoder:
        """The one place where devices are counted: `local` makes the decoder of one of several."""
        mesh = self.kernels.mesh
        if mesh is None or self.kernels.tp == 1:
            return local(leaves)
        specs: list[Any] = list(self.specs.values())
        cuts, backend = tuple(specs[i].sharding.spec for i in places), self.kernels.backend
        return ShardedDecoder(local, leaves, cuts, mesh, self.config, specs[0].dtype, backend, peers)

    @cached_property
    def head_places(self) -> tuple[int, ...]:
        """Which leaves the output head reads: the more arrays a call is given, the longer the host takes."""
        heads = ("embedding" if self.config.tie_embeddings else "lm_head", "score")
        return tuple(i for i, name in enumerate(self.specs) if name.split(".")[0] in heads)

    @property
    def widened_elements(self) -> int:
        """On a device, of the largest weight that XLA writes out in the model's dtype before a product; of
        experts', one at a time.
        """
        sizes = [0]
        for name, held in self.formats.items():
            values = self.specs[f"{name}.values"]
            assert values.sharding is not None
            shape = values.sharding.shard_shape(values.shape)
            if not held.rounds_activations:
                sizes.append(math.prod(shape[1:] if ".experts." in name else shape) * held.per_value)
        return max(sizes)


@dataclass(frozen=True)
class LoadedModel:
    """A decoder and its weights as a flat tuple, the form in which compiled steps take them."""

    skeleton: Skeleton
    leaves: tuple[jax.Array, ...]
    dtype: jnp.dtype

    @property
    def config(self) -> DecoderConfig:
        return self.skeleton.config

    def merge(self, leaves: tuple[jax.Array, ...], peers: jax.Array | None = None) -> AnyDecoder:
        """See `Skeleton.merge`."""
        return self.skeleton.merge(leaves, peers)

    def merge_head(self, leaves: tuple[jax.Array, ...]) -> AnyDecoder:
        """See `Skeleton.merge_head`."""
        return self.skeleton.merge_head(leaves)


def load_model(
    folder: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    backend: str = "xla",
    tuning: Tuning = UNTUNED,
    hf_overrides: Mapping[str, Any] | None = None,
    config: DecoderConfig | None = None,
    model_format: str | None = None,
    dequantise: bool | None = None,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """Reads a checkpoint onto the mesh's devices (default: JAX's first), shard by shard.

    `dtype` "auto" is float32 on a CPU; elsewhere the checkpoint's 16-bit type, and bfloat16 for float32.
    `tuning` is what was measured on the device. `config` replaces what `config.json` says;
    `model_format`, that of the checkpoint (see `formats.recognise`), is needed where no file tells it;
    `dequantise`: whether quantised weights are widened to the model's dtype as they are read; None: on a CPU,
    whose products are fastest so, where memory allows.
    `on_progress(bytes done, bytes in all)` may be called from any thread. Converted checkpoints (see `orbax`)
    are read too.
    Everything is checked before anything is allocated. Raises CheckpointError and ConfigError.
    """
    whole, path = read_json(folder, hf_overrides)
    raw, where = text_part(whole, path)
    family = family_of(raw, where)
    config = build_config(raw, where) if config is None else config
    quantisation = recognise(raw, where, folder, model_format)
    stored = stored_dtype(folder)
    if quantisation is not None and stored == jnp.float16:
        # Files in float16 were made for kernels that read nothing else; the models overflow in it.
        stored = jnp.dtype("bfloat16")
    chosen = pick_dtype(dtype, stored, _platform(mesh))
    loader = _Loader(
        folder, chosen, Kernels(backend, mesh, tuning), dequantise, on_progress, raw is not whole
    )
    if orbax.is_converted(folder):
        return loader.converted(config)
    if random_weights.are_random(folder):
        return loader.random(config)
    return loader.tensors(family, config, quantisation)


@dataclass(frozen=True)
class _Loader:
    """One call of `load_model`."""

    folder: str | os.PathLike[str]
    dtype: jnp.dtype
    kernels: Kernels
    dequantise: bool | None
    on_progress: Progress | None
    within_others: bool
    """Whether the language model's tensors are a part of the checkpoint's."""

    def tensors(
        self, family: Family, config: DecoderConfig, quantisation: Quantisation | None
    ) -> LoadedModel:
        """From safetensors."""
        with CheckpointReader(self.folder) as files:
            own: TensorReader = TextPartReader(files) if self.within_others else files
            own = own if family.stacked is None else StackedReader(own, family.stacked)
            reader = own if quantisation is None else QuantReader(own, quantisation)
            names = names_read(reader, len(config.layers))
            rules = family.rules(config, self.kernels.tp)
            config, rules = settle_head(config, rules, reader, names, self.dtype)
            skeleton = build_skeleton(config, self.dtype, self.kernels)
            shapes = {name: spec.shape for name, spec in skeleton.specs.items()}
            if isinstance(reader, QuantReader):
                names = without_zero_biases(rules, reader, names, shapes)
            leaves = bind(rules, reader, shapes, names)
            for leaf in leaves.values():
                leaf.check_dtypes(self.dtype)
            if isinstance(reader, QuantReader):
                return self._quantised(leaves, skeleton, reader)
            return self._finish(skeleton, load_leaves(leaves, skeleton.specs, self.on_progress))

    def _quantised(self, leaves: Mapping[str, Leaf], dense: Skeleton, reader: QuantReader) -> LoadedModel:
        """`dense` is the model whose weights are all widened."""
        if self._widens(dense):
            log.info("%d quantised weights become %s as they are read", len(reader.tensors), self.dtype)
            return self._finish(dense, load_leaves(leaves, dense.specs, self.on_progress))
        formats, found = held_leaves(leaves, reader, dense.specs)
        skeleton = build_skeleton(dense.config, self.dtype, self.kernels, formats)
        return self._finish(skeleton, load_leaves(found, skeleton.specs, self.on_progress))

    def converted(self, config: DecoderConfig) -> LoadedModel:
        """From what `orbax.save` wrote."""
        manifest = orbax.read_manifest(self.folder)
        if any(name.startswith(HEAD) for name in manifest["leaves"]):  # `settle_head` may have kept it
            config = replace(config, tie_embeddings=False)
        formats = orbax.read_formats(self.folder)
        dense = build_skeleton(config, self.dtype, self.kernels)
        orbax.check_formats(self.folder, formats, dense.specs)
        saved = build_skeleton(config, jnp.dtype("float32"), Kernels(), formats).specs
        cuts = cuts_of(self.folder, formats, saved, dense.specs)
        held = {name: cut.held for name, cut in cuts.items()}
        skeleton = build_skeleton(config, self.dtype, self.kernels, held) if held else dense
        arrays = load_converted(self.folder, saved, skeleton.specs, cuts)
        if self.on_progress is not None:
            total = sum(array.nbytes for array in arrays.values())
            self.on_progress(total, total)
        if held and self._widens(dense):
            return self._finish(dense, widened(arrays, held, dense.specs))
        return self._finish(skeleton, arrays)

    def random(self, config: DecoderConfig) -> LoadedModel:
        """See `random_weights`."""
        dense = build_skeleton(config, self.dtype, self.kernels)
        held = random_weights.formats(self.folder, dense.specs)
        if not held or self._widens(dense):
            return self._finish(dense, random_weights.draw(dense.specs))
        if self.kernels.tp > 1:
            raise ConfigError("random quantised weights are made for one device; leave out --random")
        skeleton = build_skeleton(config, self.dtype, self.kernels, held)
        return self._finish(skeleton, random_weights.draw(skeleton.specs, held))

    def _widens(self, dense: Skeleton) -> bool:
        """Whether quantised weights become those of `dense`: by default on a CPU that has memory for them."""
        if self.dequantise is not None or _platform(self.kernels.mesh) != "cpu":
            return bool(self.dequantise)
        needed = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in dense.specs.values())
        free = available_memory()
        if needed > SHARE_OF_MEMORY * free:
            log.warning(
                "weights stay quantised, which is slow on a CPU: as %s they would take %.3g GB, "
                "and %.3g GB are free",
                self.dtype, needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed <= SHARE_OF_MEMORY * free

    def _finish(self, skeleton: Skeleton, arrays: Mapping[str, jax.Array]) -> LoadedModel:
        return LoadedModel(skeleton, tuple(arrays[name] for name in skeleton.specs), self.dtype)


def available_memory() -> int:
    """Bytes of the machine's memory that can be had."""
    return psutil.virtual_memory().available


def build_skeleton(
    config: DecoderConfig,
    dtype: jnp.dtype,
    kernels: Kernels,
    formats: Mapping[str, WeightFormat] = MappingProxyType({}),
) -> Skeleton:
    """The decoder of a config, without allocating anything; the weights named in `formats` are quantised.

    Raises ConfigError where `tp` does not fit.
    """

    rounds = any(held.rounds_activations for held in formats.values())
    kernels = replace(kernels, without_triton=rounds and kernels.platform == "gpu")

    def build() -> Decoder:
        decoder = Decoder(config, dtype=dtype, kernels=kernels)
        for name, held in formats.items():
            hold_quantised(_linear(decoder, name), held)
        return decoder

    abstract = nnx.eval_shape(build)
    graphdef, state = nnx.split(abstract)
    variables, _ = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    specs = {}
    for path, variable in variables:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        specs[name] = _spec(name, variable, kernels.mesh)
    return Skeleton(config, kernels, graphdef, jax.tree.structure(state), formats, specs)


def _linear(decoder: Decoder, weight: str) -> Linear:
    """The layer that has the weight of that name."""
    found: Any = decoder
    for key in weight.split(".")[:-1]:
        found = found[int(key)] if key.isdecimal() else getattr(found, key)
    return found


def pick_dtype(dtype: str, stored: jnp.dtype, platform: str) -> jnp.dtype:
    """The model's dtype for a `dtype` option, the checkpoint's dtype and a platform. Raises ConfigError."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
        return jnp.dtype(dtype)
    if platform == "cpu":
        return jnp.dtype("float32")  # matrix products in 16 bits are an order of magnitude slower there
    return stored if stored.itemsize == 2 else jnp.dtype("bfloat16")


def stored_dtype(folder: str | os.PathLike[str]) -> jnp.dtype:
    """The dtype of a checkpoint's largest weight that is not quantised. Raises CheckpointError."""
    if orbax.is_converted(folder):
        weights = orbax.read_manifest(folder)["leaves"].values()
        return jnp.dtype(max(weights, key=lambda weight: math.prod(weight["shape"]))["dtype"])
    if random_weights.are_random(folder):
        return random_weights.stored_dtype(folder)
    with CheckpointReader(folder) as reader:
        infos = [reader.info(name) for name in reader.names()]
    if not infos:
        raise CheckpointError(f"{folder}: the checkpoint holds no tensors; download it again")
    return jnp.dtype(max(infos, key=lambda info: (is_float(info.dtype), info.nbytes)).dtype)


def _spec(name: str, variable: nnx.Variable, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    if mesh is None:
        where: Any = SingleDeviceSharding(jax.devices()[0])
    else:
        where = sharding(name, variable.shape, variable.axes, mesh)
    return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=where)


def _platform(mesh: Mesh | None) -> str:
    devices = jax.devices() if mesh is None else mesh.devices.flat
    return devices[0].platform
