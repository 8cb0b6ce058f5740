"""The pages that sequences hold, and those that wait to be found again: what of the KV cache is whose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmdeploy_jax.cache.layout import CacheGroup
from lmdeploy_jax.cache.pages import PAGE_SIZE, PagePool
from lmdeploy_jax.cache.prefix import PrefixIndex, next_hash
from lmdeploy_jax.cache.states import StateIndex
from lmdeploy_jax.prompt import EncodedPrompt


@dataclass(slots=True)
class PageRun:
    """Pages of a sequence in one cache group, in order: the first is the sequence's page number `first`."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.pages)


@dataclass(slots=True)
class PageTable:
    """The pages that a sequence holds, a run for each cache group; none while it has no slot."""

    runs: list[PageRun] = field(default_factory=list)
    room: int = 0  # tokens that can be computed before `CacheManager.hold` must be asked again
    version: int = 0  # grows with every change

    @property
    def pages(self) -> Iterator[int]:
        """All of them, in no order that matters."""
        return (page for run in self.runs for page in run.pages)


class CachedPrefix(NamedTuple):
    """What is known of a sequence's first tokens."""

    pages: PageTable  # shared now
    hashes: list[bytes]  # of each of those pages
    state: int | None = None  # the row of the state behind them, in models that have states
    shared: int = 0  # tokens whose pages are known, of which a state may be missing


class CacheManager:
    """Owns the page pool: deals pages out to sequences and finds cached prefixes.

    With `enabled=False` no prefix is found, and pages are only counted. states: of models with recurrent
    layers, where a prefix is only found with the state behind it.
    """

    def __init__(
        self,
        num_pages: int,
        groups: Sequence[CacheGroup],
        *,
        enabled: bool = True,
        states: StateIndex | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.enabled = enabled
        self.states = states
        self.index = PrefixIndex(len(self.groups))
        self.pool = PagePool(num_pages, self.index.forget)

    def emptied(self) -> CacheManager:
        """A new one of the same kind, in which nothing is held or cached."""
        states = None if self.states is None else StateIndex(self.states.rows)
        return CacheManager(self.pool.num_pages, self.groups, enabled=self.enabled, states=states)

    # -- prefixes -----------------------------------------------------------------------------------------

    def match(
        self, prompt: EncodedPrompt, tokens: Sequence[int], limit: int, hashes: list[bytes]
    ) -> CachedPrefix:
        """The longest cached prefix of `tokens`, at most `limit` tokens. `tokens` are the prompt's and those
        that have been generated; `hashes`, of their first pages, grows by those that are newly hashed: a
        sequence that waits for pages is looked for in every step.
        """
        hashes = self._known_hashes(prompt, tokens, limit, hashes) if self.enabled else []
        known = count = self._usable(hashes)
        state = None
        if self.states is not None:
            while count and (state := self.states.find(hashes[count - 1])) is None:
                count = self._usable(hashes[: count - 1])
        table = PageTable([self._run(i, hashes, count) for i in range(len(self.groups))])
        for page in table.pages:
            self.pool.share(page)
        return CachedPrefix(table, hashes[:count], state, known * PAGE_SIZE)

    def state_ends(self, found: CachedPrefix, tokens: int) -> tuple[int, ...]:
        """Behind which of a sequence's `tokens` a state is to be kept, of those to compute: where it leaves
        the pages that others know, so that the next one may begin there, and behind its last full page.
        """
        if self.states is None or not self.states.rows:
            return ()
        ends = {found.shared, (tokens - 1) // PAGE_SIZE * PAGE_SIZE}
        return tuple(sorted(end for end in ends if end > len(found.hashes) * PAGE_SIZE))

    def keep_state(self, hashes: Sequence[bytes], end: int) -> int | None:
        """The row for the state behind `end` tokens, `hashes` of whose pages are known; None: it need not be
        kept.
        """
        assert self.states is not None
        return self.states.take(hashes[end // PAGE_SIZE - 1])

    def _known_hashes(
        self, prompt: EncodedPrompt, tokens: Sequence[int], limit: int, hashes: list[bytes]
    ) -> list[bytes]:
        """Of the first pages of `tokens`, as far as the groups without a window know them."""
        whole = [i for i, group in enumerate(self.groups) if group.window is None]
        for number in range(limit // PAGE_SIZE):
            if number == len(hashes):
                parent = hashes[-1] if hashes else None
                hashes.append(next_hash(parent, prompt, tokens, number * PAGE_SIZE))
            if any(self.index.find(i, hashes[number]) is None for i in whole):
                return hashes[:number]
        return hashes[: limit // PAGE_SIZE]

    def _usable(self, hashes: list[bytes]) -> int:
        """Most pages of which every group has what the next token's window reaches."""
        count, missing = len(hashes), 0
        while count and missing >= 0:
            missing = max(self._last_missing(i, hashes, count) for i in range(len(self.groups)))
            count = missing if missing >= 0 else count  # a longer prefix would need the missing page too
        return count

    def _last_missing(self, i: int, hashes: list[bytes], count: int) -> int:
        """The last of the pages that a prefix of `count` pages needs and the group lacks; -1: none."""
        if self.groups[i].window is None:
            return -1
        first = self.groups[i].first_page(count * PAGE_SIZE)
        needed = reversed(range(first, count))
        return next((page for page in needed if self.index.find(i, hashes[page]) is None), -1)

    def _run(self, i: int, hashes: list[bytes], count: int) -> PageRun:
        first = self.groups[i].first_page(count * PAGE_SIZE)
        found = (self.index.find(i, digest) for digest in hashes[first:count])
        return PageRun(first, [page for page in found if page is not None])

    def register(
        self,
        prompt: EncodedPrompt,
        tokens: Sequence[int],
        computed: int,
        table: PageTable,
        hashes: list[bytes],
    ) -> None:
        """Remember the pages that `computed` of `tokens` fill; `hashes` grows by the newly hashed pages."""
        if not self.enabled:
            return
        for number in range(len(hashes), min(computed, len(tokens)) // PAGE_SIZE):
            parent = hashes[-1] if hashes else None
            hashes.append(next_hash(parent, prompt, tokens, number * PAGE_SIZE))
            for i, run in enumerate(table.runs):
                if run.first <= number < run.end:
                    self.index.add(i, hashes[-1], run.pages[number - run.first])

    def discard(self, table: PageTable, hashes: Sequence[bytes]) -> list[int]:
        """Forget what a sequence has computed. Returns the pages that nobody else reads and that may hold it:
        its own, which stay its own, and, where windows have passed some, all that are free.
        """
        if self.states is not None:
            self.states.forget(hashes)
        alone = [page for page in table.pages if self.pool.users(page) == 1]
        for page in alone:
            if page in self.index:
                self.index.forget(page)
        if all(group.window is None for group in self.groups):
            return alone
        self.pool.drop(self._cached(hashes))
        return alone + self.pool.free

    def _cached(self, hashes: Sequence[bytes]) -> Iterator[int]:
        """Pages with these contents that no sequence holds."""
        found = (self.index.find(i, digest) for i in range(len(self.groups)) for digest in hashes)
        return (page for page in found if page is not None and not self.pool.users(page))

    # -- pages of a sequence ------------------------------------------------------------------------------

    def missing(self, table: PageTable, position: int, end: int) -> int:
        """Pages that must be available for `hold`; less than 0 where it gives more back than it takes."""
        return sum(
            group.end_page(position, end) - run.end - self._freed(run, group.first_page(position))
            for group, run in zip(self.groups, table.runs, strict=True)
            if group.end_page(position, end) > run.end
        )

    def _freed(self, run: PageRun, first: int) -> int:
        passed = run.pages[: max(first - run.first, 0)]
        return sum(self.pool.users(page) == 1 for page in passed)

    def hold(self, table: PageTable, position: int, end: int) -> None:
        """Give back the pages that no query from `position` on can read, and take those for `end` tokens (or
        as many of them as a group holds at once). Raises IndexError where the pool is empty.
        """
        for group, run in zip(self.groups, table.runs, strict=True):
            passed = group.first_page(position) - run.first
            if passed > 0:
                self._release(run.pages[:passed])
                del run.pages[:passed]
                run.first += passed
        for group, run in zip(self.groups, table.runs, strict=True):
            run.pages += [self.pool.take() for _ in range(group.end_page(position, end) - run.end)]
        table.room = min(run.end for run in table.runs) * PAGE_SIZE
        table.version += 1

    def release(self, table: PageTable, *, clean: bool = True) -> None:
        """Give all pages back; those whose content is known stay findable until their space is needed.

        clean: False where no token has told that the pages hold no NaN.
        """
        self.pool.unclean.update(() if clean else table.pages)
        for run in table.runs:
            self._release(run.pages)
        table.runs = []
        table.room = 0

    def _release(self, pages: Iterable[int]) -> None:
        self.pool.release(pages, self.index.__contains__)

    # -- several sequences of one prompt ------------------------------------------------------------------

    def take_last(self, length: int) -> PageTable:
        """For a sequence that will fork from another after `length` tokens: a page of its own in each group
        for the last tokens, if they do not fill one.
        """
        partial = length % PAGE_SIZE > 0
        own = [[self.pool.take()] if partial else [] for _ in self.groups]
        return PageTable([PageRun(length // PAGE_SIZE, pages) for pages in own])

    def fork(self, source: PageTable, table: PageTable) -> list[tuple[int, int]]:
        """Share all but the last, partly filled pages of `source` with `table`, which `take_last` made.
        Returns which pages must be copied: (from, to).
        """
        copies: list[tuple[int, int]] = []
        for run, own in zip(source.runs, table.runs, strict=True):
            count = own.first - run.first
            copies += [(run.pages[count], page) for page in own.pages]
            for page in run.pages[:count]:
                self.pool.share(page)
            own.first, own.pages = run.first, run.pages[:count] + own.pages
        table.version += 1
        return copies
