"""LG EXAONE 4: norms behind each block and none before; the large one has windows, where alone it rotates."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig


def exaone4_config(fields: Fields) -> DecoderConfig:
    """HF `Exaone4Config`."""
    head_dim, layers = head_size(fields), count_layers(fields)
    window = fields.optional_size("sliding_window", 4096)
    period = _period(fields)
    default = [SLIDING if window is not None and (i + 1) % period else FULL for i in range(layers)]
    windows = layer_windows(fields, default, window)
    rotates = [window is None or layer is not None for layer in windows]
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=windows,
        rope_layers=rotates,
        attention={"qk_norm": True},
        layer={"pre_norm": False, "post_norm": True},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def _period(fields: Fields) -> int:
    """Layers from one without a window to the next; older configs draw them, "LLLG"."""
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        return len(pattern)
    return fields.size("sliding_window_pattern", 4, least=0) or 4
