"""LG EXAONE 4: norms behind each block and none before; the large one has windows, where alone it rotates.
K-EXAONE: mixtures, with norms before each block.
"""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.mixture import MixtureNames, after_dense, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

EXAONE_NAMES = MixtureNames(correction="e_score_correction_bias")


def exaone4_config(fields: Fields) -> DecoderConfig:
    """HF `Exaone4Config`."""
    return _config(fields, layer={"pre_norm": False, "post_norm": True})


def exaone_moe_config(fields: Fields) -> DecoderConfig:
    """HF `ExaoneMoeConfig`."""
    inner = fields.size("moe_intermediate_size", 1024)
    mixture = read_mixture(
        fields,
        width=inner,
        shared=inner * fields.size("num_shared_experts", 1, least=0),
        experts=64,
        per_token=8,
        scores="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
        correction=True,
        groups=fields.size("n_group", 1),
        top_groups=fields.size("topk_group", 1),
        float32=True,
    )
    return _config(fields, mixture=mixture, sparse=after_dense(fields, 1))


def _config(fields: Fields, **features: Any) -> DecoderConfig:
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
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        **features,
    )


def _period(fields: Fields) -> int:
    """Layers from one without a window to the next; older configs draw them, "LLLG"."""
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        return len(pattern)
    return fields.size("sliding_window_pattern", 4, least=0) or 4
