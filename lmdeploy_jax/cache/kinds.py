"""What a layer keeps of a sequence, told without any array: which arrays, and what a page or a slot of them
takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.pallas_kernels.kv_formats import WORD_DTYPE, KVFormat

Shape = tuple[int, ...]
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class LatentCache:
    """A latent of each token for all heads, by page: one array [pages, 1, PAGE_SIZE, width], whole on every
    device.
    """

    width: int
    window: int | None = None
    chunked: bool = False

    axes: ClassVar[Axes] = ()

    def shapes(self, num_pages: int) -> tuple[Shape, ...]:
        """As `PagedCache.shapes`."""
        return ((num_pages, 1, PAGE_SIZE, self.width),)

    def dtypes(self, dtype: Any) -> tuple[Any, ...]:
        """As `PagedCache.dtypes`."""
        return (dtype,)

    def page_bytes(self, itemsize: int, devices: int = 1) -> int:
        """As `PagedCache.page_bytes`."""
        return devices * itemsize * sum(map(prod, self.shapes(1)))


@dataclass(frozen=True)
class PagedCache:
    """K and V of tokens, by page: two arrays [pages, kv_heads, PAGE_SIZE, head_dim], cut by heads. Quantised,
    each is two: words, and scales [pages, kv_heads, PAGE_SIZE], as `format` has it.

    window: how many tokens attention reaches back, the query's own counted; None: all, so that all are kept.
    chunked: it reaches back to the last multiple of `window`, which is one of the page size too.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None
    chunked: bool = False
    format: KVFormat | None = None

    axes: ClassVar[Axes] = (None, "tp")
    """Which leading axes of its arrays are cut over the `tp` devices that share a model."""

    def shapes(self, num_pages: int) -> tuple[Shape, ...]:
        """The shapes of its arrays, over all devices."""
        tokens = (num_pages, self.kv_heads, PAGE_SIZE)
        if self.format is None:
            return ((*tokens, self.head_dim),) * 2
        return ((*tokens, self.format.words(self.head_dim)), tokens) * 2

    def dtypes(self, dtype: Any) -> tuple[Any, ...]:
        """Those of its arrays, where the model computes in `dtype`."""
        return (dtype,) * 2 if self.format is None else (WORD_DTYPE, self.format.scale_dtype) * 2

    def page_bytes(self, itemsize: int, devices: int = 1) -> int:
        """Bytes of one page over all `devices`, at `itemsize` bytes an element unless it is quantised."""
        heads, form = 2 * self.kv_heads * PAGE_SIZE, self.format
        return heads * (itemsize * self.head_dim if form is None else form.head_bytes(self.head_dim))


@dataclass(frozen=True)
class StateCache:
    """What a recurrent layer keeps of a whole sequence, by slot: the last inputs of its convolution [slots,
    *conv] and, in float32, its state [slots, *state]; both cut by heads. Behind the slots of sequences lie
    those of states behind prefixes, and the last is nobody's.
    """

    conv: Shape
    state: Shape = ()
    """Empty: the layer has nothing but its convolution."""

    axes: ClassVar[Axes] = (None, "tp")

    def shapes(self, num_slots: int) -> tuple[Shape, ...]:
        """As `PagedCache.shapes`, of so many slots."""
        return tuple((num_slots, *shape) for shape in (self.conv, self.state) if shape)

    def dtypes(self, dtype: Any) -> tuple[Any, ...]:
        """As `PagedCache.dtypes`."""
        return (dtype, "float32")[: len(self.shapes(1))]

    def slot_bytes(self, itemsize: int) -> int:
        """Bytes of one slot over all devices, at `itemsize` bytes an element of the convolution's inputs."""
        return itemsize * prod(self.conv) + (4 * prod(self.state) if self.state else 0)


@dataclass(frozen=True)
class SharedCache:
    """Nothing of its own: the layer reads what an earlier one, number `layer`, keeps of each token."""

    layer: int


PageKind = PagedCache | LatentCache
CacheKind = PageKind | StateCache
"""What a cache has arrays of."""
LayerKind = CacheKind | SharedCache
