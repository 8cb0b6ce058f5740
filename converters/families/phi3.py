"""Phi-3, 3.5 and Phi-4 (mini): q, k and v in one tensor, gate and up in one, longrope, perhaps half of a head rotated."""

from __future__ import annotations

from converters.families.common import decoder_config, head_size
from converters.families.fields import Fields
from converters.families.rope import read_rope
from lmdeploy_jax.models.config import DecoderConfig


def phi3_config(fields: Fields) -> DecoderConfig:
    """HF `Phi3Config`. "su" and "yarn" are old names of longrope there; a window, where there is one, is everywhere."""
    head_dim = head_size(fields)
    rope = read_rope(fields, head_dim, partial=True, aliases={"su": "longrope", "yarn": "longrope"})
    window = fields.optional_size("sliding_window", None)
    windows = (window,) * fields.size("num_hidden_layers")
    return decoder_config(fields, head_dim=head_dim, rope=rope, windows=windows)
