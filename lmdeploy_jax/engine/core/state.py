"""What stays on the device from one step to the next."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.cache.kv import CacheSpec, KVCache
from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.parallel.peers import PeerMemory, table_spec

if TYPE_CHECKING:
    from lmdeploy_jax.converters.vision import LoadedVisionModel

Leaves = tuple[Array, ...]


class History(NamedTuple):
    """What each slot's sequence has said so far, for penalties and biases; see `lmdeploy_jax.sampling`."""

    counts: Array  # i32 [slots + 1, V]
    bias: Array  # f32 [slots + 1, V]


class Update(NamedTuple):
    """What a program puts in the place of the state it was given; None: it stays as it is."""

    caches: KVCache | None = None
    pending: Array | None = None
    history: History | None = None
    image_rows: Array | None = None


class DeviceState:
    """The arrays that programs read and write, by the names of the programs' parameters.

    Only the weights are there from the beginning: programs are compiled while the rest is not allocated yet.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: CacheSpec,
        max_batch_size: int,
        vision: LoadedVisionModel | None = None,
        image_capacity: int = 0,
    ) -> None:
        self.skeleton = model.skeleton
        self.dtype = model.dtype
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.replicated = NamedSharding(cache.mesh, PartitionSpec())
        self.leaves: Leaves = model.leaves
        self._peers: PeerMemory | None = None
        self.caches: Any = ()  # a KVCache, once allocated
        self.pending: Any = (
            None  # i32 [slots + 1], each slot's last token: the next step need not wait for it
        )
        self.history: History | None = None  # allocated with the first request that needs it
        self.vision = vision
        self.vision_leaves: Leaves = () if vision is None else vision.leaves
        self.image_capacity = image_capacity  # rows of images that are held, see `engine.core.encoder`
        self.image_rows: Any = None  # as `_image_rows` says

    @property
    def head_leaves(self) -> Leaves:
        """The weights that the output head reads."""
        leaves = self.leaves
        return tuple(leaves[i] for i in self.skeleton.head_places)

    @property
    def peers(self) -> Array | None:
        """The table by which devices reach each other's memory, where they do."""
        return None if self._peers is None else self._peers.table

    @property
    def vocab_size(self) -> int:
        return self.skeleton.config.vocab_size

    def take(self, update: Update) -> None:
        """Hold what a program has written in place of what it was given."""
        if update.caches is not None:
            self.caches = update.caches
        if update.pending is not None:
            self.pending = update.pending
        if update.history is not None:
            self.history = update.history
        if update.image_rows is not None:
            self.image_rows = update.image_rows

    def put(self, array: Any) -> Any:
        """A host array on every device."""
        if self.replicated.is_fully_addressable:
            return jax.device_put(array, self.replicated)
        # On several nodes `device_put` would ask all of them whether they were given the same.
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, self.replicated, array.__getitem__)

    # -- memory, given back and taken again ---------------------------------------------------------------

    def allocate_caches(self) -> None:
        """A new, empty KV cache; and, once, the memory in which devices store for each other."""
        if self._peers is None and self.skeleton.kernels.has_peers:
            self._peers = PeerMemory.allocate(self.cache.mesh, self.skeleton.config.hidden_size, self.dtype)
        self.caches = self.cache.allocate()
        self.pending = self.put(np.zeros(self.max_batch_size + 1, np.int32))
        if self.vision is not None:
            spec = self._image_rows(self.vision)
            self.image_rows = self.put(jnp.zeros(spec.shape, spec.dtype))

    def release_caches(self) -> None:
        """Free the KV cache, the histories and images' rows. No program may run before `allocate_caches`."""
        for array in jax.tree.leaves((self.caches, self.history, self.image_rows)):
            array.delete()
        self.caches, self.history, self.image_rows = (), None, None

    @property
    def weights(self) -> tuple[Leaves, Leaves]:
        """The decoder's, and those of what encodes images."""
        return self.leaves, self.vision_leaves

    @weights.setter
    def weights(self, weights: tuple[Leaves, Leaves]) -> None:
        self.leaves, self.vision_leaves = weights

    def release_weights(self) -> None:
        """Free them. No program may run before they are set again."""
        for leaf in (*self.leaves, *self.vision_leaves):
            leaf.delete()
        self.weights = (), ()

    # -- shapes -------------------------------------------------------------------------------------------

    @cached_property
    def specs(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of all that a program may ask for, by name."""
        leaves = _specs(self.leaves)
        history = (self.max_batch_size + 1, self.vocab_size)
        images: dict[str, Any] = {}
        if self.vision is not None:
            images = {
                "vision_leaves": _specs(self.vision_leaves),
                "image_rows": self._image_rows(self.vision),
            }
        return {
            **images,
            "leaves": leaves,
            "head_leaves": tuple(leaves[i] for i in self.skeleton.head_places),
            "caches": self.cache.specs,
            "peers": table_spec(self.cache.mesh) if self.skeleton.kernels.has_peers else None,
            "pending": self.ints(self.max_batch_size + 1),
            "history": History(self.ints(*history), self.floats(*history)),
        }

    @cached_property
    def shardings(self) -> dict[str, Any]:
        """Of all that a program may write, by name."""
        return {
            "caches": self.cache.shardings,
            "pending": self.replicated,
            "history": self.replicated,
            "image_rows": self.replicated,
        }

    def ints(self, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.replicated)

    def floats(self, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.replicated)

    def _image_rows(self, vision: LoadedVisionModel) -> Any:
        """[1 + k, image_capacity + 1, E] with k DeepStack layers; the last row is for what nobody wants."""
        levels = 1 + len(vision.config.tower.deepstack)
        shape = (levels, self.image_capacity + 1, self.skeleton.config.hidden_size)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.replicated)

    def hidden(self, rows: int) -> Any:
        """Hidden states of so many tokens, and what else their rows hold."""
        shape = (rows, self.skeleton.config.row_width)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=self.replicated)


def _specs(leaves: Leaves) -> tuple[Any, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
