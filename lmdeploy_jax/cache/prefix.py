"""Prefix caching: full pages are found again by a hash of everything up to their end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from lmdeploy_jax.cache.pages import PAGE_SIZE, PagePool
from lmdeploy_jax.prompt import EncodedPrompt


def root_hash(salt: bytes) -> bytes:
    """What the first page of a prompt with this salt has in the place of a page before it."""
    return blake2b(salt, digest_size=16).digest()


ROOT = root_hash(b"")


def page_hash(parent: bytes, tokens: Sequence[int], content: bytes = b"") -> bytes:
    """Identity of a full page: its tokens, the `EncodedPrompt.content` among them, everything before them."""
    return blake2b(parent + array("i", tokens).tobytes() + content, digest_size=16).digest()


class PrefixCache:
    """Owns the page pool and knows which pages hold which prefix. With `enabled=False` it only counts
    pages.
    """

    def __init__(self, num_pages: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.pool = PagePool(num_pages, self._forget)
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def match(
        self, prompt: EncodedPrompt, tokens: Sequence[int], limit: int
    ) -> tuple[list[int], list[bytes]]:
        """Longest run of cached pages that begins `tokens`, at most `limit` tokens; the pages are shared.

        `tokens` are the prompt's and those that have been generated.
        """
        pages: list[int] = []
        hashes: list[bytes] = []
        if not self.enabled:
            return pages, hashes
        parent = _root(prompt)
        for start in range(0, limit - PAGE_SIZE + 1, PAGE_SIZE):
            parent = _next_hash(parent, prompt, tokens, start)
            page = self._page_of.get(parent)
            if page is None:
                break
            pages.append(page)
            hashes.append(parent)
        for page in pages:
            self.pool.share(page)
        return pages, hashes

    def register(
        self,
        prompt: EncodedPrompt,
        tokens: Sequence[int],
        computed: int,
        pages: Sequence[int],
        hashes: list[bytes],
    ) -> None:
        """Remember the pages that `computed` of `tokens` fill; `hashes` grows by the newly hashed pages.

        Where the same content is cached already, the older page stays the cached one.
        """
        if not self.enabled:
            return
        full = min(computed, len(tokens)) // PAGE_SIZE
        for i in range(len(hashes), full):
            parent = hashes[-1] if hashes else _root(prompt)
            digest = _next_hash(parent, prompt, tokens, i * PAGE_SIZE)
            hashes.append(digest)
            if digest not in self._page_of:
                self._page_of[digest] = pages[i]
                self._hash_of[pages[i]] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; registered ones stay findable until their space is needed."""
        self.pool.release(pages, self._hash_of.__contains__)

    def discard(self, pages: Sequence[int]) -> list[int]:
        """Forget what those of `pages` hold that have one user; returns them. They stay that user's."""
        alone = [page for page in pages if self.pool.users(page) == 1]
        for page in alone:
            if page in self._hash_of:
                self._forget(page)
        return alone

    def _forget(self, page: int) -> None:
        del self._page_of[self._hash_of.pop(page)]


def _root(prompt: EncodedPrompt) -> bytes:
    return root_hash(prompt.salt) if prompt.salt else ROOT


def _next_hash(parent: bytes, prompt: EncodedPrompt, tokens: Sequence[int], start: int) -> bytes:
    stop = start + PAGE_SIZE
    return page_hash(parent, tokens[start:stop], prompt.content(start, stop) if prompt.spans else b"")
