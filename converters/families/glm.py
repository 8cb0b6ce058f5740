"""GLM-4: neighbours rotate in pairs, half of each head; GLM-4-0414 with norms behind each block, too. GLM-4.5
to 4.7: mixtures, whose heads rotate by halves; and Solar Open, which is made as these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lmdeploy_jax.converters.families.common import NONE, Features, decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import after_dense, read_mixture
from lmdeploy_jax.converters.families.rope import Mrope, read_rope
from lmdeploy_jax.converters.families.tables import PRE_NORMS, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig

NORMS: Mapping[str, str] = {
    **PRE_NORMS,
    "post_self_attn_layernorm": "attention_post_norm",
    "post_mlp_layernorm": "mlp_post_norm",
}
MROPE = Mrope((8, 12, 12))
glm_rules = partial(hf_rules, fused_mlp=True, interleaved=True)
glm4_rules = partial(glm_rules, norms=NORMS)


def glm_config(
    fields: Fields, layer: Features = NONE, *, head: int | None = 128, mrope: Mrope | None = None
) -> DecoderConfig:
    """HF `GlmConfig`. head: the size of heads where the config has none."""
    head_dim = head_size(fields, head)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, partial=True, share=0.5, mrope=mrope),
        attention={"qkv_bias": fields.flag("attention_bias", True)},
        layer=layer,
        norm_eps=fields.positive("rms_norm_eps", 1.5625e-07),
    )


def glm4_config(fields: Fields) -> DecoderConfig:
    """HF `Glm4Config`."""
    return glm_config(fields, {"post_norm": True})


def glm4v_config(fields: Fields) -> DecoderConfig:
    """HF `Glm4vTextConfig`."""
    return glm_config(fields, {"post_norm": True}, head=None, mrope=MROPE)


def glm4_moe_config(fields: Fields, mrope: Mrope | None = None) -> DecoderConfig:
    """HF `Glm4MoeConfig`; with M-RoPE, `Glm4vMoeTextConfig`."""
    head_dim = head_size(fields)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, partial=True, share=0.5, mrope=mrope),
        attention={
            "qkv_bias": fields.flag("attention_bias", mrope is not None),
            "qk_norm": fields.flag("use_qk_norm", False),
        },
        mixture=sigmoid_mixture(fields, width=1408, experts=128, per_token=8),
        sparse=after_dense(fields, 1),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def solar_open_config(fields: Fields) -> DecoderConfig:
    """HF `SolarOpenConfig`: a mixture in every layer, and heads that rotate as a whole."""
    head_dim = head_size(fields, 128)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=1e6, partial=True),
        attention={"qkv_bias": fields.flag("attention_bias", False)},
        mixture=sigmoid_mixture(fields, width=1280, experts=128, per_token=8),
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def sigmoid_mixture(
    fields: Fields,
    *,
    width: int,
    experts: int,
    per_token: int,
    groups: tuple[int, int] = (1, 1),
    scale: float = 1.0,
    normalise: bool = True,
    expert: Features = NONE,
) -> MixtureConfig:
    """The mixture of DeepSeek V3 and its kin; the numbers are the family's defaults. expert: see
    `read_mixture`.

    Raises UnsupportedModelError for another way of choosing, which transformers would pass over.
    """
    fields.require("scoring_func", {"sigmoid": "sigmoid"}, "sigmoid")
    fields.require("topk_method", {"noaux_tc": "noaux_tc"}, "noaux_tc")
    inner = fields.size("moe_intermediate_size", width)
    return read_mixture(
        fields,
        width=inner,
        shared=inner * fields.size("n_shared_experts", 1, least=0),
        experts=experts,
        per_token=per_token,
        expert=expert,
        scores="sigmoid",
        normalise=fields.flag("norm_topk_prob", normalise),
        scale=fields.number("routed_scaling_factor", scale),
        correction=True,
        groups=fields.size("n_group", groups[0]),
        top_groups=fields.size("topk_group", groups[1]),
        float32=True,
    )
