"""Which layers share arrays of the KV cache and page tables, and how many pages a sequence takes of them.

A page is a row of every array. Layers that keep the same tokens of a sequence form a *group*, which has a
page table of its own; the groups of a model have equally many layers, and all of them take their pages from
one pool. So a page holds 64 tokens for the layers of one group, and memory goes to whichever group needs it:
layers with a window keep a window's worth of pages, and leave the rest of the pool to the others.

Recurrent layers have no pages and are in no group: each has arrays of its own, with a row a slot. A layer
that reads another's keys and values has that one's place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lmdeploy_jax.cache.kinds import CacheKind, LayerKind, PageKind, SharedCache, StateCache
from lmdeploy_jax.cache.pages import PAGE_SIZE, pages_for

MOST_GROUPS = 8  # each has a page table, which goes to the device with every step


@dataclass(frozen=True)
class CacheGroup:
    """Layers that keep the same tokens: all of a sequence's, or those that a window reaches.

    chunked: the window begins at the last multiple of its size, so that all of it is let go at once.
    most_pages: what a sequence holds of a group with a window, where a step computes as many of its tokens as
    a step may have.
    """

    window: int | None = None
    most_pages: int | None = None
    chunked: bool = False

    def first_page(self, position: int) -> int:
        """Number of the first page that a query at `position`, or a later one, may read."""
        if self.window is None:
            return 0
        if self.chunked:
            return position // self.window * self.window // PAGE_SIZE
        return max(position - self.window + 1, 0) // PAGE_SIZE

    def end_page(self, position: int, end: int) -> int:
        """Number of the page behind those to hold for `end` tokens, of which `position` are computed."""
        if self.most_pages is None:
            return pages_for(end)
        return min(pages_for(end), self.first_page(position) + self.most_pages)

    def width(self, session_len: int, tokens: int) -> int:
        """Pages of a sequence that a step may read or write which computes `tokens` of its tokens."""
        whole = pages_for(session_len)
        return whole if self.window is None else min(whole, _reach(self.window, tokens))


@dataclass(frozen=True)
class CacheLayout:
    """The groups of a cache, its arrays, and where each mixer, numbered through all layers, finds its own."""

    groups: tuple[CacheGroup, ...]
    arrays: tuple[CacheKind, ...]
    places: tuple[tuple[int | None, int], ...]
    """Of each mixer: its group, None where it keeps a state, and the index of its arrays."""

    @property
    def paged(self) -> tuple[PageKind, ...]:
        """The arrays with a row a page."""
        return tuple(kind for kind in self.arrays if not isinstance(kind, StateCache))

    @property
    def states(self) -> tuple[StateCache, ...]:
        """The arrays with a row a slot."""
        return tuple(kind for kind in self.arrays if isinstance(kind, StateCache))

    def pages_of(self, tokens: int) -> int:
        """Most pages that a sequence of `tokens` tokens takes, over all groups, while it is computed."""
        return sum(group.end_page(0, tokens) for group in self.groups)

    def longest(self, num_pages: int) -> int:
        """Tokens of the longest sequence for which so many pages are enough."""
        most = [num_pages if group.most_pages is None else group.most_pages for group in self.groups]

        def taken(pages: int) -> int:
            return sum(min(pages, held) for held in most)

        return (bisect_right(range(num_pages + 1), num_pages, key=taken) - 1) * PAGE_SIZE

    def room(self, num_pages: int, session_len: int) -> int:
        """Tokens of context that the pool's pages hold, in sequences of `session_len` that are decoding."""
        pages = sum(group.width(session_len, 1) for group in self.groups)
        return num_pages * session_len // pages if len(self.groups) > 1 else num_pages * PAGE_SIZE


def plan_layout(layers: Sequence[LayerKind], *, session_len: int, step_tokens: int) -> CacheLayout:
    """The layout in which a sequence of `session_len` tokens takes the least memory.

    layers: what each mixer keeps. step_tokens: most tokens of a step.
    """
    paged = (kind for kind in layers if not isinstance(kind, StateCache | SharedCache))
    kinds = [_reaching(kind, session_len) for kind in paged]
    sizes = range(1, max(kinds.count(kind) for kind in kinds) + 1)
    layouts = [_one_group(kinds), *(_grouped(kinds, size, step_tokens) for size in sizes)]
    few = [layout for layout in layouts if len(layout.groups) <= MOST_GROUPS]
    return _with_others(min(few, key=lambda layout: (_cost(layout, session_len), len(layout.groups))), layers)


def _with_others(layout: CacheLayout, layers: Sequence[LayerKind]) -> CacheLayout:
    """The layout of the layers with pages of their own, and the others among them."""
    arrays, paged = list[CacheKind](layout.arrays), iter(layout.places)
    places: list[tuple[int | None, int]] = []
    for kind in layers:
        if isinstance(kind, StateCache):
            places.append((None, len(arrays)))
            arrays.append(kind)
        elif isinstance(kind, SharedCache):
            places.append(places[kind.layer])
        else:
            places.append(next(paged))
    return CacheLayout(layout.groups, tuple(arrays), tuple(places))


def _reaching(kind: PageKind, session_len: int) -> PageKind:
    """A window that no sequence outgrows is none."""
    return _without_window(kind) if kind.window is None or kind.window >= session_len else kind


def _without_window(kind: PageKind) -> PageKind:
    return replace(kind, window=None, chunked=False)


def _reach(window: int, tokens: int) -> int:
    """Pages that `tokens` queries in a row read and write, wherever in a page they begin."""
    return pages_for(window + tokens) + 1


def _cost(layout: CacheLayout, session_len: int) -> int:
    pages = sum(group.width(session_len, 1) for group in layout.groups)
    return pages * sum(kind.page_bytes(1) for kind in layout.paged)


def _one_group(kinds: Sequence[PageKind]) -> CacheLayout:
    """Every layer has arrays of its own and keeps every token, whatever its window."""
    arrays = tuple(map(_without_window, kinds))
    return CacheLayout((CacheGroup(),), arrays, tuple((0, i) for i in range(len(kinds))))


def _grouped(kinds: Sequence[PageKind], size: int, step_tokens: int) -> CacheLayout:
    """Groups of at most `size` layers of one kind, which share `size` arrays with the other groups."""
    shapes = list(dict.fromkeys(map(_without_window, kinds)))
    groups: list[CacheGroup] = []
    places: dict[int, tuple[int, int]] = {}
    for kind in dict.fromkeys(kinds):
        array = shapes.index(_without_window(kind)) * size
        for i, layer in enumerate(_layers_of(kinds, kind)):
            if i % size == 0:
                groups.append(_group(kind, step_tokens))
            places[layer] = len(groups) - 1, array + i % size
    arrays = tuple(shape for shape in shapes for _ in range(size))
    return CacheLayout(tuple(groups), arrays, tuple(places[i] for i in range(len(kinds))))


def _group(kind: PageKind, step_tokens: int) -> CacheGroup:
    if kind.window is None:
        return CacheGroup()
    return CacheGroup(kind.window, _reach(kind.window, step_tokens), kind.chunked)


def _layers_of(kinds: Sequence[PageKind], kind: PageKind) -> Iterator[int]:
    return (i for i, other in enumerate(kinds) if other == kind)
