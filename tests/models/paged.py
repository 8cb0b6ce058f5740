"""Runs a loaded decoder over a paged cache in two compiled shapes: packed chunks, one token a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.converters.load import LoadedModel
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE
from lmdeploy_jax.pallas_kernels.prefill_attention import build_tiles, max_tiles, tile_rows
from lmdeploy_jax.parallel.mesh import make_mesh, model_devices
from lmdeploy_jax.parallel.peers import PeerMemory

TOKENS = 192  # ragged shape
PAGES_EACH = 4


class PagedRunner:
    """Up to `rows` sequences on a model, pages dealt out in a shuffled order."""

    def __init__(self, model: LoadedModel, rows: int = 3, mesh: jax.sharding.Mesh | None = None) -> None:
        self.model = model
        self.rows = rows
        pages = np.random.default_rng(0).permutation(rows * PAGES_EACH) + 1
        self.table = pages.reshape(rows, PAGES_EACH).astype(np.int32)
        mesh = mesh or make_mesh(1)
        # Windows longer than any sequence make one cache group, the plain one.
        layout = model.config.cache_layout(model_devices(mesh), session_len=1, step_tokens=TOKENS)
        self.caches = CacheSpec(layout, rows * PAGES_EACH + 1, model.dtype, mesh, rows + 1).allocate()
        self.memory: PeerMemory | None = None
        if model.skeleton.kernels.has_peers:
            self.memory = PeerMemory.allocate(mesh, model.config.hidden_size, model.dtype)
        self.peers = None if self.memory is None else self.memory.table
        # Compiled without LLVM's optimisations: the tests' time is compilation.
        fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.step = jax.jit(self._step, donate_argnums=1, compiler_options=fast)

    def _step(self, leaves, caches, batch, peers):
        decoder = self.model.merge(leaves, peers)
        hidden, caches = decoder(caches, batch)
        return decoder.logits(hidden), caches

    def run(self, batch: Batch) -> np.ndarray:
        logits, self.caches = self.step(self.model.leaves, self.caches, batch, self.peers)
        return np.asarray(logits)

    def ragged(
        self, chunks: Sequence[tuple[int, int, Sequence[int], int]], **optional: np.ndarray
    ) -> list[np.ndarray]:
        """Packed chunks (sequence, first position, ids, prompt length) -> each one's logits [count, V].

        `optional`: fields of the batch that most models do without.
        """
        counts = [len(ids) for _, _, ids, _ in chunks]
        starts = np.cumsum([0, *counts])
        tokens, positions, lengths, slots = np.zeros((4, TOKENS), np.int32)
        kv_lens = np.zeros(self.rows, np.int32)
        for (row, first, ids, prompt), start in zip(chunks, starts, strict=False):
            at = slice(start, start + len(ids))
            tokens[at], positions[at] = ids, np.arange(first, first + len(ids))
            lengths[at] = np.maximum(positions[at] + 1, prompt)
            slots[at] = self._slots(row, positions[at])
            kv_lens[row] = first + len(ids)
        rows, firsts = zip(*((row, first) for row, first, _, _ in chunks), strict=True)
        height = tile_rows(self.model.skeleton.kernels.backend)
        width = max_tiles(TOKENS, self.rows, height)
        tiles = build_tiles(rows, starts[:-1], counts, firsts, height, width)
        attention = AttentionMetadata(slots, self.table, kv_lens, tiles)
        logits = self.run(Batch(tokens, positions, lengths, (attention,), np.arange(self.rows), **optional))
        return np.split(logits, starts[1:])[:-1]

    def decode(self, tokens: dict[int, tuple[int, int]]) -> dict[int, np.ndarray]:
        """One token for each sequence {row: (token, position)}, the other rows padding -> {row: logits}."""
        ids, positions, slots, kv_lens = np.zeros((4, self.rows), np.int32)
        table = np.zeros_like(self.table)
        for row, (token, position) in tokens.items():
            ids[row], positions[row], kv_lens[row] = token, position, position + 1
            slots[row], table[row] = self._slots(row, position), self.table[row]
        attention = AttentionMetadata(slots, table, kv_lens)
        logits = self.run(Batch(ids, positions, positions + 1, (attention,), np.arange(self.rows)))
        return {row: logits[row] for row in tokens}

    def _slots(self, row: int, positions):
        return self.table[row][positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE


def named_leaves(model: LoadedModel) -> dict[str, jax.Array]:
    """A model's weights by name, as `orbax.save` takes them."""
    return dict(zip(model.skeleton.specs, model.leaves, strict=True))
