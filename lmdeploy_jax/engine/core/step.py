"""A planned step: what the scheduler hands on to whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy_jax.engine.request import Sequence

if TYPE_CHECKING:
    import numpy as np

    from lmdeploy_jax.cache.encoder_cache import EncoderRun


@dataclass(slots=True)
class Chunk:
    """Tokens `start .. start + count` of a sequence; row `i` of the step is its `i`-th chunk."""

    sequence: Sequence
    start: int
    count: int
    from_device: bool  # the last token is read from the device's pending array


@dataclass
class Step:
    """One forward pass, and which sequences draw their next token from which of its rows."""

    chunks: list[Chunk] = field(default_factory=list)
    sampled: list[tuple[Sequence, int]] = field(default_factory=list)
    unclean: list[int] = field(default_factory=list)  # pages to overwrite before it
    copies: list[tuple[int, int]] = field(default_factory=list)  # pages to duplicate after it: (from, to)
    restored: list[tuple[int, int]] = field(default_factory=list)  # states to copy before it: (from, to)
    kept: list[tuple[int, int]] = field(default_factory=list)  # and after it, forks' too
    admitted: list[Sequence] = field(default_factory=list)  # given a slot since the last step
    repeat: int = 1  # tokens that each sequence draws, one after another, where all are decoding
    encoder_runs: list[EncoderRun] = field(default_factory=list)  # before it
    embedding_index: np.ndarray | None = None  # int32, see `models.batch.Batch`; None: no token is an image's
    lookahead: np.ndarray | None = None  # int32, see `models.batch.AttentionMetadata`

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def decode_only(self) -> bool:
        return all(chunk.from_device for chunk in self.chunks)
