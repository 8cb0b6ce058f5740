"""Mixers that keep a state of fixed size of each sequence, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmdeploy_jax.cache.kinds import StateCache


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet (Yang et al., 2024): a short convolution, and the delta rule over a matrix a head."""

    key_heads: int
    value_heads: int
    """A multiple of `key_heads`: neighbours share a query and a key."""
    key_dim: int
    value_dim: int
    taps: int
    """Tokens that the convolution reaches over, the last included."""

    rope: ClassVar[None] = None

    @property
    def per_key(self) -> int:
        """Value heads a key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Of the convolution, a key head: its query, its key, and the values of its value heads."""
        return 2 * self.key_dim + self.per_key * self.value_dim

    def cache(self, tp: int) -> StateCache:
        """What the layer keeps of each sequence."""
        conv = (self.key_heads, self.taps - 1, self.channels)
        return StateCache(conv, (self.value_heads, self.key_dim, self.value_dim))

    def why_not_kernels(self) -> str | None:
        """As `AttentionConfig.why_not_kernels`."""
        return "the delta rule has no hand-written kernel yet"

    def weights(self, hidden: int) -> int:
        """As `AttentionConfig.weights`."""
        values = self.value_heads * self.value_dim
        return hidden * (self.key_heads * self.channels + 2 * values + 2 * self.value_heads)

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """As `AttentionConfig.read_bytes`: the same for every context."""
        return float(self.cache(tp).slot_bytes(itemsize))

    def __str__(self) -> str:
        return f"gated DeltaNet with {self.value_heads} heads"


RecurrentConfig = DeltaConfig
