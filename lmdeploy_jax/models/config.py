"""What distinguishes one decoder-only family from another, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lmdeploy_jax.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: Mapping[str, RopeKind] = {kind: kind for kind in get_args(RopeKind)}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. The kinds and their fields are those of HF's `modeling_rope_utils.py`."""

    dim: int
    """Leading elements of each head that rotate."""
    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin."""
    original_max_position: int = 0
    """Context length before scaling; what dynamic NTK and longrope compare a sequence's length with."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies change with the sequence's length (`Batch.rope_lens`)."""
        return self.kind in ("dynamic", "longrope")

    @property
    def switch_length(self) -> int | None:
        """Length beyond which a sequence's keys are all rotated anew (longrope's other set of factors)."""
        return self.original_max_position if self.kind == "longrope" else None


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and features of a decoder. Per-layer tuples have one entry a layer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    """Longest sequence the checkpoint's config names; the default session length."""
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """Newest keys that each layer's queries see; None: all."""
    rope_layers: tuple[bool, ...]
    """Which layers rotate queries and keys at all."""
    attention_scale: float
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotation."""
    tie_embeddings: bool = False
    pre_norm: bool = True
    """RMSNorm on what enters attention and MLP."""
    post_norm: bool = False
    """RMSNorm on what leaves attention and MLP, before it is added to the residual."""
    norm_offset: float = 0.0
    """Added to every norm's weight; 1 in Gemma."""
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    local_rope: RopeConfig | None = None
    """RoPE of the layers that have a window, where it differs from the others'."""

    @property
    def added_plainly(self) -> bool:
        """Whether what attention and MLP return is added to the residual stream as it is."""
        return not self.post_norm and self.residual_multiplier == 1.0

    def kv_heads(self, tp: int) -> int:
        """KV heads that caches and weights hold on `tp` devices: at least one a device, by repeating them.

        Raises ConfigError where the heads cannot be dealt out evenly.
        """
        if self.num_kv_heads % tp == 0:
            return self.num_kv_heads
        groups = self.num_heads // self.num_kv_heads
        repeats = tp // self.num_kv_heads
        if tp % self.num_kv_heads == 0 and groups % repeats == 0:
            return tp
        raise ConfigError(
            f"tp={tp} cannot share out {self.num_heads} attention heads in {self.num_kv_heads} KV heads "
            f"evenly; choose a tp that divides {self.num_kv_heads}, or a multiple of it that divides "
            f"{self.num_heads}"
        )
