"""What a step's head program knows about each sequence it samples for."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters, one entry per sampled row; every field is `[R]`.

    The random key of a row is `fold_in(key(seed), step)`, so a request gives the same tokens in any batch,
    at any row, and after preemption. Padding rows have temperature 0 and switch everything else off.
    """

    temperature: Array  # f32; 0: greedy
    top_k: Array  # i32; 0: off
    top_p: Array  # f32; 1: off
    min_p: Array  # f32; 0: off
    seed: Array  # u32
    step: Array  # i32, tokens the sequence has generated so far
    repetition: Array  # f32; 1: off. Over prompt and generated tokens, as in HF and CTRL (arXiv:1909.05858)
    presence: Array  # f32; 0: off. Over generated tokens, OpenAI's formula
    frequency: Array  # f32; 0: off. Over generated tokens, OpenAI's formula
