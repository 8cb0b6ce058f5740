"""DeepSeek V2 to V3.2, Kimi K2, GLM-4.7-Flash and 5: latent attention, mixtures behind the first layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lmdeploy_jax.converters.families.common import (
    FULL,
    SLIDING,
    count_heads,
    count_layers,
    decoder_config,
    head_size,
    layer_windows,
)
from lmdeploy_jax.converters.families.glm import sigmoid_mixture
from lmdeploy_jax.converters.families.mixture import after_dense, mixture_rules, read_mixture, sparse_layers
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Layout, Rows, TurnedTails
from lmdeploy_jax.models.config import DecoderConfig, LatentConfig, MixtureConfig, RopeConfig
from lmdeploy_jax.pallas_kernels.options import AttentionOptions


def deepseek_v2_config(fields: Fields) -> DecoderConfig:
    """HF `DeepseekV2Config`. `norm_topk_prob` has no effect there, and others disagree: true is refused."""
    if fields.flag("norm_topk_prob", False):
        raise fields.unsupported("norm_topk_prob", True, "false")
    fields.require("scoring_func", {"softmax": "softmax"}, "softmax")
    grouped = fields.require("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    groups, top_groups = fields.size("n_group", 1), fields.size("topk_group", 1)
    inner = fields.size("moe_intermediate_size", 1407)
    mixture = read_mixture(
        fields,
        width=inner,
        shared=inner * fields.size("n_shared_experts", 2, least=0),
        experts=64,
        scale=fields.number("routed_scaling_factor", 1.0),
        groups=groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        group_score="max",
        float32=True,
    )
    return _latent_config(fields, mixture, after_dense(fields, 0), eps=1e-6)


def deepseek_v3_config(fields: Fields) -> DecoderConfig:
    """HF `DeepseekV3Config`."""
    mixture = sigmoid_mixture(fields, width=2048, experts=256, per_token=8, groups=(8, 4), scale=2.5)
    return _latent_config(fields, mixture, after_dense(fields, 3), eps=1e-6)


def deepseek_v32_config(fields: Fields) -> DecoderConfig:
    """HF `DeepseekV32Config`, as long as a sequence has no more tokens than its index would choose."""
    return replace(deepseek_v3_config(fields), exact_length=_index_length(fields))


def glm_moe_dsa_config(fields: Fields) -> DecoderConfig:
    """HF `GlmMoeDsaConfig`, as long as a sequence has no more tokens than its index would choose."""
    mixture = sigmoid_mixture(fields, width=2048, experts=256, per_token=8, scale=2.5)
    for name in ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"):
        fields.get(name)
    config = _latent_config(fields, mixture, after_dense(fields, 3), eps=1e-5, query_rank=2048)
    return replace(config, exact_length=_index_length(fields))


def _index_length(fields: Fields) -> int:
    for name in ("index_n_heads", "index_head_dim", "indexer_rope_interleave", "layer_types"):
        fields.get(name)
    return fields.size("index_topk", 2048)


def dots1_config(fields: Fields) -> DecoderConfig:
    """HF `Dots1Config`: V3's mixtures behind plain attention, with norms of q and k."""
    head_dim, layers = head_size(fields), count_layers(fields)
    window, first = (
        fields.optional_size("sliding_window", 4096),
        fields.size("max_window_layers", 62, least=0),
    )
    default = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    bias = fields.flag("attention_bias", False)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        windows=layer_windows(fields, default, window),
        attention={"qkv_bias": bias, "o_bias": bias, "qk_norm": True},
        mixture=sigmoid_mixture(fields, width=1408, experts=128, per_token=6, normalise=False),
        sparse=after_dense(fields, 0),
    )


def glm4_moe_lite_config(fields: Fields) -> DecoderConfig:
    """HF `Glm4MoeLiteConfig`."""
    mixture = sigmoid_mixture(fields, width=1536, experts=64, per_token=4, scale=1.8)
    first = fields.size("first_k_dense_replace", 1, least=0)
    sparse = sparse_layers(fields, [i >= first for i in range(count_layers(fields))])
    return _latent_config(fields, mixture, sparse, eps=1e-5)


def minicpm3_config(fields: Fields) -> DecoderConfig:
    """HF `MiniCPM3Config`: no mixtures, and factors of embeddings, residuals and logits."""
    layers, hidden = count_layers(fields), fields.size("hidden_size")
    base = fields.optional_size("dim_model_base", 256)
    depth = fields.optional_number("scale_depth", 1.4)
    return _latent_config(
        fields,
        None,
        None,
        eps=1e-5,
        query_rank=768,
        sizes=(256, 64, 32, hidden // count_heads(fields)),
        embedding_multiplier=fields.positive("scale_emb", 12),
        logit_multiplier=1.0 if base is None else base / hidden,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        layer={"residual_multiplier": 1.0 if depth is None else depth * layers**-0.5},
    )


def _latent_config(
    fields: Fields,
    mixture: MixtureConfig | None,
    sparse: tuple[bool, ...] | None,
    *,
    eps: float,
    query_rank: int = 1536,
    sizes: tuple[int, int, int, int] = (512, 128, 64, 128),
    **features: Any,
) -> DecoderConfig:
    """sizes: what the latents' rank, and the parts of heads without rotation, with it and of values, are by
    default.
    """
    rank, nope, rope_dim, value = (
        fields.size(name, size)
        for name, size in zip(
            ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), sizes, strict=True
        )
    )
    for name in ("head_dim", "qk_head_dim", "ep_size", "num_mtp_layers"):  # said otherwise, or of training
        fields.get(name)
    if not fields.flag("rope_interleave", True):
        raise fields.unsupported("rope_interleave", False, "true")
    rope = read_rope(fields, rope_dim)
    latent = LatentConfig(
        heads=count_heads(fields),
        latent_rank=rank,
        nope_dim=nope,
        rope_dim=rope_dim,
        value_dim=value,
        options=AttentionOptions((nope + rope_dim) ** -0.5 * _temperature(fields, rope) ** 2),
        rope=rope,
        query_rank=fields.optional_size("q_lora_rank", query_rank),
        bias=fields.flag("attention_bias", False),
    )
    return decoder_config(
        fields,
        head_dim=nope + rope_dim,
        rope=rope,
        latent=latent,
        mixture=mixture,
        sparse=sparse,
        mlp={"bias": fields.flag("mlp_bias", False)},
        norm_eps=fields.positive("rms_norm_eps", eps),
        **features,
    )


def _temperature(fields: Fields, rope: RopeConfig) -> float:
    """By which both queries and keys are multiplied where RoPE is scaled."""
    given = fields.table("rope_scaling") or fields.table("rope_parameters")
    share = Fields(given, f"{fields.where}: rope_parameters").number("mscale_all_dim", 0.0)
    if rope.kind == "default" or not share or rope.factor <= 1:
        return 1.0
    return 0.1 * share * math.log(rope.factor) + 1.0


def latent_rules(config: DecoderConfig, tp: int, *, pairs: bool = True, **usual: Any) -> tuple[Rule, ...]:
    """`mixture_rules`, with latent attention's own names. pairs: neighbours rotate, not halves."""
    latent = config.layers[0].mixer
    assert isinstance(latent, LatentConfig)  # as the configs above make it
    block, target = LAYER + r"self_attn\.", LAYER_TARGET + "attention."
    queries: Layout = TurnedTails(latent.nope_dim, latent.rope_dim, 2) if pairs else Rows(2)
    latents: Layout = TurnedTails(latent.latent_rank, latent.rope_dim, 1) if pairs else Rows()
    attention = (
        Rule(block + r"q_proj\.weight", target + "q.weight", "", queries),
        Rule(block + r"q_a_proj\.(weight|bias)", target + r"q_a.\2"),
        Rule(block + r"q_a_layernorm\.weight", target + "q_a_norm.weight"),
        Rule(block + r"q_b_proj\.weight", target + "q_b.weight", "", queries),
        Rule(block + r"kv_a_proj_with_mqa\.(weight|bias)", target + r"kv_a.\2", "", latents),
        Rule(block + r"kv_a_layernorm\.weight", target + "kv_a_norm.weight"),
        Rule(block + r"kv_b_proj\.weight", target + "kv_b.weight", "", Rows(2)),
        Rule(block + r"indexer\..*", None),  # see `DecoderConfig.exact_length`
    )
    return mixture_rules(config, tp, attention=attention, **usual)
