"""Phi-3, 3.5 and Phi-4: q, k and v in one tensor, gate and up in one, longrope, on a part of each head."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import count_layers, decoder_config, head_size
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def phi3_config(fields: Fields) -> DecoderConfig:
    """HF `Phi3Config`; "su" and "yarn" are old names of longrope there. A window is one of all layers."""
    head_dim = head_size(fields)
    aliases = {"su": "longrope", "yarn": "longrope"}
    rope = read_rope(fields, head_dim, partial=True, aliases=aliases, original=4096)
    window = fields.optional_size("sliding_window", None)
    windows = (window,) * count_layers(fields)
    return decoder_config(fields, head_dim=head_dim, rope=rope, windows=windows)
