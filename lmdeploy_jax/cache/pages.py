"""The page pool: which pages of the KV cache are free, in use, or idle with content worth keeping."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE

DUMP_PAGE = 0  # takes the writes of padding tokens; never handed out


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_SIZE)


class PagePool:
    """Reference-counted pages 1 .. num_pages - 1.

    A page nobody refers to is either free, or *idle*: kept for the prefix cache until the space is needed,
    the longest unused first. `forget` is told of each idle page that is taken away. `unclean` are those that
    may hold NaN, which must be overwritten before they hold anything else.
    """

    def __init__(self, num_pages: int, forget: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: a pool needs the dump page and at least one more")
        self.num_pages = num_pages
        self._free = deque(range(1, num_pages))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_pages
        self._forget = forget
        self.unclean: set[int] = set()
        self._taken_unclean: list[int] = []

    @property
    def available(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        return self.num_pages - 1

    @property
    def used(self) -> int:
        return self.capacity - self.available

    def take(self) -> int:
        """A page for new content. Raises IndexError when none is available."""
        if self._free:
            page = self._free.popleft()
        else:
            if not self._idle:
                raise IndexError("the page pool is empty")
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._refs[page] = 1
        if page in self.unclean:
            self.unclean.remove(page)
            self._taken_unclean.append(page)
        return page

    def pop_taken_unclean(self) -> list[int]:
        """The unclean pages that have been taken since the last call."""
        pages, self._taken_unclean = self._taken_unclean, []
        return pages

    def share(self, page: int) -> None:
        """One more user of a page that is in use or idle."""
        self._idle.pop(page, None)
        self._refs[page] += 1

    def users(self, page: int) -> int:
        """How many refer to a page."""
        return self._refs[page]

    def release(self, pages: Iterable[int], keep: Callable[[int], bool] = lambda page: False) -> None:
        """One user fewer of each page; pages that `keep` wants become idle, the others free.

        Pages come in a sequence's order and idle from the last on, so that a prefix is evicted from its end.
        """
        for page in reversed(list(pages)):
            self._refs[page] -= 1
            if self._refs[page] < 0:
                raise ValueError(f"page {page} was released more often than it was taken")
            if self._refs[page] == 0:
                if keep(page):
                    self._idle[page] = None
                else:
                    self._free.append(page)

    @property
    def free(self) -> list[int]:
        """Pages that nobody refers to and that hold nothing worth keeping."""
        return list(self._free)

    def drop(self, pages: Iterable[int]) -> None:
        """Idle pages become free. `forget` is told of them."""
        for page in set(pages):
            del self._idle[page]
            self._free.append(page)
            self._forget(page)

    def check_integrity(self, in_use: Iterable[int] = ()) -> None:
        """Raise AssertionError unless the pages in use are exactly `in_use` (with multiplicity)."""
        expected = [0] * self.num_pages
        for page in in_use:
            expected[page] += 1
        assert expected == self._refs, "page references differ from the sequences' pages"
        unused = sorted([*self._free, *self._idle])
        assert unused == [p for p in range(1, self.num_pages) if not expected[p]], (
            "pages were lost or doubled"
        )
