"""Qwen 1.5, 2 and 2.5 (biases on q, k and v), Qwen3 (RMSNorm on each head of q and k), and their mixtures.
Qwen-VL's language models are the same with M-RoPE.
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
    used_window,
)
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture, sparse_layers
from lmdeploy_jax.converters.families.rope import Mrope, read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig

QWEN2_MROPE, QWEN3_MROPE = Mrope((16, 24, 24)), Mrope((24, 20, 20), interleaved=True)
QWEN_NAMES = MixtureNames(shared="shared_expert")


def qwen2_config(fields: Fields, mrope: Mrope | None = None) -> DecoderConfig:
    """HF `Qwen2Config`; with M-RoPE, `Qwen2VLTextConfig`."""
    head_dim = head_size(fields)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, mrope=mrope),
        windows=_windows(fields),
        attention={"qkv_bias": True},
    )


def mimo_config(fields: Fields) -> DecoderConfig:
    """The published `MiMoConfig`: Qwen 2, and layers that predict further, which are not read."""
    fields.get("attention_bias")  # q, k and v have one
    return qwen2_config(fields)


def qwen3_config(fields: Fields, mrope: Mrope | None = None) -> DecoderConfig:
    """HF `Qwen3Config`; heads are 128 wide unless the config says otherwise. With M-RoPE,
    `Qwen3VLTextConfig`.
    """
    head_dim = head_size(fields, 128)
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, mrope=mrope),
        windows=_windows(fields),
        attention={"qk_norm": True, "qkv_bias": bias, "o_bias": bias},
    )


def qwen2_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen2MoeConfig`: every mixture has a shared block with a gate."""
    head_dim, layers = head_size(fields), count_layers(fields)
    shared = fields.size("shared_expert_intermediate_size", 5632)
    window = _moe_window(fields)
    last = fields.size("max_window_layers", 28, least=0)
    default = [FULL if window is None or i % 2 or i >= last else SLIDING for i in range(layers)]
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=layer_windows(fields, default, window),
        attention={"qkv_bias": fields.flag("qkv_bias", True)},
        mixture=_mixture(fields, experts=60, per_token=4, width=1408, shared=shared, shared_gate=True),
        sparse=_sparse(fields),
    )


def qwen3_vl_moe_config(fields: Fields) -> DecoderConfig:
    """HF `Qwen3VLMoeTextConfig`, whose weights are always normalised."""
    fields.get("norm_topk_prob")
    return qwen3_moe_config(fields, QWEN3_MROPE, normalise=True)


def qwen3_moe_config(
    fields: Fields, mrope: Mrope | None = None, normalise: bool | None = None
) -> DecoderConfig:
    """HF `Qwen3MoeConfig`. normalise: whether weights are, whatever the config says."""
    head_dim = head_size(fields)
    bias = fields.flag("attention_bias", False)
    fields.get("max_window_layers")  # a window is one of all layers here
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, mrope=mrope),
        windows=(_moe_window(fields),) * count_layers(fields),
        attention={"qk_norm": True, "qkv_bias": bias, "o_bias": bias},
        mixture=_mixture(fields, experts=128, per_token=8, width=768, normalise=normalise),
        sparse=_sparse(fields),
    )


def _moe_window(fields: Fields) -> int | None:
    """`sliding_window` where it counts; transformers writes 0 where not."""
    if fields.flag("use_sliding_window", False):
        return fields.optional_size("sliding_window", 4096)
    fields.get("sliding_window")
    return None


def _mixture(fields: Fields, *, width: int, normalise: bool | None = None, **given: Any) -> MixtureConfig:
    inner = fields.size("moe_intermediate_size", width)
    normalise = fields.flag("norm_topk_prob", False) if normalise is None else normalise
    return read_mixture(fields, width=inner, normalise=normalise, **given)


def _sparse(fields: Fields) -> tuple[bool, ...]:
    """Every `decoder_sparse_step`th layer but for `mlp_only_layers`."""
    return sparse_layers(fields, every_sparse_step(fields))


def every_sparse_step(fields: Fields) -> list[bool]:
    """Which layers are mixtures, where a list of them does not say so."""
    step, dense = fields.size("decoder_sparse_step", 1), fields.items("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(count_layers(fields))]


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """With `use_sliding_window`, the layers from `max_window_layers` on have a window."""
    window = used_window(fields, 4096)
    first, layers = fields.size("max_window_layers", 28, least=0), count_layers(fields)
    default = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return layer_windows(fields, default, window)
