"""Rotary position embeddings (Su et al., 2021) and their extensions, as in HF's `modeling_rope_utils.py`.

cos and sin are computed once a step, in float32, for all layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int32

from lmdeploy_jax.models.config import RopeConfig


class Rotation(NamedTuple):
    """cos and sin of each token's angles; R = rope.dim / 2."""

    cos: Float32[Array, "T R"] | None
    sin: Float32[Array, "T R"] | None
    query_factor: Float32[Array, "T"] | None = None  # see `RopeConfig.llama_4_scaling_beta`


def rotation(rope: RopeConfig, positions: Int32[Array, "*axes T"], lengths: Int32[Array, "T"]) -> Rotation:
    """Angles of tokens at `positions` in sequences of `lengths` (see `Batch`)."""
    factor = _query_factor(rope, positions) if rope.llama_4_scaling_beta else None
    if not rope.dim:
        return Rotation(None, None, factor)
    frequencies = _frequencies_by_length(rope, lengths) if rope.depends_on_length else _frequencies(rope)
    turns = positions.astype(jnp.float32)
    angles = (turns[:, None] if turns.ndim == 1 else turns[_axes(rope)].T) * frequencies
    cos, sin = lax.platform_dependent(angles, cpu=_turn_once, default=_turn)
    return Rotation(cos * rope.attention_factor, sin * rope.attention_factor, factor)


def _query_factor(rope: RopeConfig, positions: Int32[Array, "T"]) -> Float32[Array, "T"]:
    times = (positions + rope.llama_4_scaling_offset) // rope.original_max_position
    return 1.0 + rope.llama_4_scaling_beta * jnp.log1p(times.astype(jnp.float32))


def _axes(rope: RopeConfig) -> np.ndarray:
    """Which of the positions of time, row and column each frequency turns by, int [R]."""
    if not rope.mrope_interleaved:
        return np.repeat(np.arange(3), rope.mrope_section)
    axes = np.zeros(rope.dim // 2, np.int32)
    for axis in (1, 2):
        axes[axis : 3 * rope.mrope_section[axis] : 3] = axis
    return axes


def _turn(angles: Array) -> tuple[Array, Array]:
    return jnp.cos(angles), jnp.sin(angles)


def _turn_once(angles: Array) -> tuple[Array, Array]:
    """Behind a condition, since XLA's loops for CPUs would compute them again for each head of each layer."""
    return lax.cond(angles[0, 0] >= 0, _turn, _turn, angles)


def _exponents(rope: RopeConfig) -> np.ndarray:
    return np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)


def _base_frequencies(rope: RopeConfig) -> np.ndarray:
    return 1.0 / np.float32(rope.theta) ** _exponents(rope)


def _frequencies(rope: RopeConfig) -> np.ndarray:
    """f32 [dim / 2], in radians a position."""
    base = _base_frequencies(rope)
    if rope.kind == "proportional":
        turning = int(rope.turning_share * rope.dim // 2)
        return np.where(np.arange(len(base)) < turning, base / np.float32(rope.factor), np.float32(0))
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base)
    return base


def _frequencies_by_length(rope: RopeConfig, lengths: Array) -> Array:
    """f32 [T, dim / 2]."""
    if rope.kind == "dynamic":
        return _dynamic_ntk(rope, lengths)
    factors = [np.asarray(f, np.float32) * _base_periods(rope) for f in (rope.short_factor, rope.long_factor)]
    return jnp.where((lengths > rope.original_max_position)[:, None], 1.0 / factors[1], 1.0 / factors[0])


def _base_periods(rope: RopeConfig) -> np.ndarray:
    return np.float32(rope.theta) ** _exponents(rope)


def _dynamic_ntk(rope: RopeConfig, lengths: Array) -> Array:
    longest = rope.original_max_position
    stretch = rope.factor * (jnp.maximum(lengths, longest) / longest) - (rope.factor - 1)  # f32 [T]
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta[:, None] ** _exponents(rope)


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Long waves are slowed down by `factor`, short ones kept, those between blended."""
    waves = rope.original_max_position * base / (2 * math.pi)  # periods that fit the original context
    blend = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * base / rope.factor + blend * base).astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """YaRN (Peng et al., 2023): as llama3, blended over the frequency's index instead of over its value."""
    low, high = (_yarn_boundary(rope, beta) for beta in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (base / rope.factor * ramp + base * (1 - ramp)).astype(np.float32)


def _yarn_boundary(rope: RopeConfig, rotations: float) -> float:
    """Index of the frequency that turns `rotations` times within the original context."""
    periods = math.log(rope.original_max_position / (rotations * 2 * math.pi))
    return rope.dim * periods / (2 * math.log(rope.theta))
