"""Qwen 1.5, 2 and 2.5 (biases on q, k and v) and Qwen3 (RMSNorm on each head of q and k)."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
    used_window,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def qwen2_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen2Config`."""
    head_dim = head_size(fields)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=_windows(fields),
        attention={"qkv_bias": True},
    )


def qwen3_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen3Config`; heads are 128 wide unless the config says otherwise."""
    head_dim = head_size(fields, 128)
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=_windows(fields),
        attention={"qk_norm": True, "qkv_bias": bias, "o_bias": bias},
    )


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    window = used_window(fields, 4096)
    first, layers = fields.size("max_window_layers", 28, least=0), count_layers(fields)
    default = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return layer_windows(fields, default, window)
