"""Mixers that keep a state of fixed size of each sequence, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lmdeploy_jax.cache.kinds import StateCache
from lmdeploy_jax.errors import ConfigError


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
        return None

    def weights(self, hidden: int) -> int:
        """As `AttentionConfig.weights`."""
        values = self.value_heads * self.value_dim
        return hidden * (self.key_heads * self.channels + 2 * values + 2 * self.value_heads)

    def activations(self, hidden: int) -> int:
        """As `MlpConfig.activations`."""
        return 8 * self.key_heads * (self.channels + self.per_key * self.value_dim)

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """As `AttentionConfig.read_bytes`: the same for every context."""
        return float(self.cache(tp).slot_bytes(itemsize))

    def __str__(self) -> str:
        return f"gated DeltaNet with {self.value_heads} heads"


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba 2 (Dao and Gu, 2024): a short convolution, and a state space of one matrix a head."""

    heads: int
    groups: int
    """A divisor of `heads`: neighbours share B and C, and the norm."""
    head_dim: int
    state_dim: int
    taps: int
    conv_bias: bool = True
    bias: bool = False
    """Of the products into it and out of it."""
    norm: Literal["after_gate", "before_gate"] | None = "after_gate"
    """Where an RMSNorm over each group's outputs stands; None: there is none."""
    input_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Of x, B, C, z and dt, as they leave their product."""
    output_multiplier: float = 1.0

    rope: ClassVar[None] = None

    def held_groups(self, tp: int) -> int:
        """Groups that weights and caches hold on `tp` devices: at least one a device, by repeating B and C.

        Raises ConfigError where the heads cannot be dealt out evenly, and where a norm over one of several
        groups would span devices.
        """
        if self.groups % tp == 0:
            return self.groups
        if tp % self.groups == 0 and self.heads % tp == 0 and (self.groups == 1 or self.norm is None):
            return tp
        raise ConfigError(
            f"tp={tp} cannot share out {self.heads} Mamba heads in {self.groups} groups; choose a tp that "
            f"divides {self.groups}"
        )

    def per_group(self, tp: int) -> int:
        """Heads of each group that is held."""
        return self.heads // self.held_groups(tp)

    def channels(self, tp: int) -> int:
        """Of the convolution, a group: x of its heads, B and C."""
        return self.per_group(tp) * self.head_dim + 2 * self.state_dim

    def cache(self, tp: int) -> StateCache:
        """As `DeltaConfig.cache`. Raises ConfigError as `held_groups` does."""
        conv = (self.held_groups(tp), self.taps - 1, self.channels(tp))
        return StateCache(conv, (self.heads, self.state_dim, self.head_dim))

    def why_not_kernels(self) -> str | None:
        """As `AttentionConfig.why_not_kernels`."""
        return None

    def weights(self, hidden: int) -> int:
        """As `AttentionConfig.weights`."""
        inner = self.heads * self.head_dim
        return hidden * (3 * inner + 2 * self.groups * self.state_dim + self.heads)

    def activations(self, hidden: int) -> int:
        """As `MlpConfig.activations`."""
        return 8 * (2 * self.heads * self.head_dim + 2 * self.groups * self.state_dim)

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """As `DeltaConfig.read_bytes`."""
        return float(self.cache(tp).slot_bytes(itemsize))

    def __str__(self) -> str:
        return f"Mamba 2 with {self.heads} heads"


@dataclass(frozen=True)
class ShortConvConfig:
    """A short convolution between two gates (LFM2)."""

    heads: int
    """Equal parts of the channels, that devices share out."""
    head_dim: int
    taps: int
    bias: bool = False
    """Of the convolution and of the products."""

    rope: ClassVar[None] = None

    def cache(self, tp: int) -> StateCache:
        """As `DeltaConfig.cache`."""
        return StateCache((self.heads, self.taps - 1, self.head_dim))

    def why_not_kernels(self) -> str | None:
        """As `AttentionConfig.why_not_kernels`."""
        return None

    def weights(self, hidden: int) -> int:
        """As `AttentionConfig.weights`."""
        return 4 * hidden * self.heads * self.head_dim

    def activations(self, hidden: int) -> int:
        """As `MlpConfig.activations`."""
        return 8 * self.heads * self.head_dim

    def read_bytes(self, context: float, itemsize: int, tp: int) -> float:
        """As `DeltaConfig.read_bytes`."""
        return float(self.cache(tp).slot_bytes(itemsize))

    def __str__(self) -> str:
        return f"short convolution over {self.heads * self.head_dim} channels"


RecurrentConfig = DeltaConfig | Mamba2Config | ShortConvConfig
