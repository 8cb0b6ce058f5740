"""Prefix caching: full pages are found again by a hash of everything up to their end."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from lmdeploy_jax.cache.pages import PAGE_SIZE
from lmdeploy_jax.prompt import EncodedPrompt


def root_hash(salt: bytes) -> bytes:
    """What the first page of a prompt with this salt has in the place of a page before it."""
    return blake2b(salt, digest_size=16).digest()


ROOT = root_hash(b"")


def page_hash(parent: bytes, tokens: Sequence[int], content: bytes = b"") -> bytes:
    """Identity of a full page: its tokens, the `EncodedPrompt.content` among them, everything before them."""
    return blake2b(parent + array("i", tokens).tobytes() + content, digest_size=16).digest()


def next_hash(parent: bytes | None, prompt: EncodedPrompt, tokens: Sequence[int], start: int) -> bytes:
    """Identity of the full page from token `start` on, behind the page `parent` (None: it is the first).

    `tokens` are the prompt's and those that have been generated.
    """
    if parent is None:
        parent = root_hash(prompt.salt) if prompt.salt else ROOT
    stop = start + PAGE_SIZE
    return page_hash(parent, tokens[start:stop], prompt.content(start, stop) if prompt.spans else b"")


class PrefixIndex:
    """Which page of each cache group holds the end of which prefix."""

    def __init__(self, num_groups: int) -> None:
        self._page_of: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self._place_of: dict[int, tuple[int, bytes]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._place_of

    def find(self, group: int, digest: bytes) -> int | None:
        """The page, or None where no page of the group holds that prefix."""
        return self._page_of[group].get(digest)

    def add(self, group: int, digest: bytes, page: int) -> None:
        """Remember a page. Where the same content is known already, the older page stays the known one."""
        if digest not in self._page_of[group]:
            self._page_of[group][digest] = page
            self._place_of[page] = group, digest

    def forget(self, page: int) -> None:
        """Let a page that is known be found no more."""
        group, digest = self._place_of.pop(page)
        del self._page_of[group][digest]
