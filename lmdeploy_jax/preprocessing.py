"""Prompts of a call that have images, prepared by several threads: to decode and resize an image takes longer
than to compute it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy_jax.arguments import PromptRequest
    from lmdeploy_jax.prompt import EncodedPrompt

THREADS = min(8, os.cpu_count() or 1)
MOST_BYTES = 2 << 30  # of patches that wait for the engine, or are kept until their answers are there

Encode = Callable[["PromptRequest"], "EncodedPrompt"]
Deliver = Callable[[int, "PromptRequest", "EncodedPrompt | BaseException"], bool]


class PreprocessingThreads:
    """Encodes prompts, several at once and in any order, as long as their patches are at most `MOST_BYTES`.

    deliver: takes a request with the encoded prompt, or with what it raised; False ends the threads. They are
    daemons: a program may end without reading its answers.
    """

    def __init__(
        self, requests: Iterable[tuple[int, PromptRequest]], encode: Encode, deliver: Deliver
    ) -> None:
        self._requests = deque(requests)
        self._encode, self._deliver = encode, deliver
        self._held: dict[int, int] = {}  # bytes of each prompt's patches
        self._changed = threading.Condition()
        for i in range(min(THREADS, len(self._requests))):
            threading.Thread(target=self._run, name=f"lmdeploy_jax images {i}", daemon=True).start()

    def release(self, index: int) -> None:
        """A prompt's patches are wanted no more."""
        with self._changed:
            if self._held.pop(index, None) is not None:
                self._changed.notify_all()

    def close(self) -> None:
        """Prepare nothing more."""
        with self._changed:
            self._requests.clear()
            self._held.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            index, request = taken
            try:
                encoded = self._encode(request)
                self._hold(index, sum(image.patches.nbytes for image in encoded.images))
                open_still = self._deliver(index, request, encoded)
            except BaseException as error:  # of a library in Rust too, or its prompt would never end
                open_still = self._deliver(index, request, error)
            if not open_still:
                return

    def _next(self) -> tuple[int, PromptRequest] | None:
        with self._changed:
            return self._requests.popleft() if self._requests else None

    def _hold(self, index: int, count: int) -> None:
        """Wait until a prompt's patches fit beside those of others; what is larger than all waits alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or sum(self._held.values()) + count <= MOST_BYTES)
            self._held[index] = count
