"""MiniMax-M2: mixtures without a shared block, and norms over all of q and of k."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

MINIMAX_NAMES = MixtureNames(
    "block_sparse_moe", correction="e_score_correction_bias", experts=("w1", "w3", "w2")
)
IGNORED = ("mtp_transformer_layers", "num_mtp_modules", "output_router_logits", "attn_type_list")


def minimax_m2_config(fields: Fields) -> DecoderConfig:
    """HF `MiniMaxM2Config`, and the published one with `rotary_dim`."""
    head_dim = head_size(fields, 128)
    rotating = fields.size("rotary_dim", head_dim)
    for name in ("use_qk_norm", "use_routing_bias"):
        if not fields.flag(name, True):
            raise fields.unsupported(name, False, "true")
    for name, value in (("scoring_func", "sigmoid"), ("qk_norm_type", "per_layer")):
        fields.require(name, {value: value}, value)
    if any(kind != 1 for kind in fields.items("attn_type_list", [])):
        raise fields.unsupported("attn_type_list", fields.get("attn_type_list"), "1, softmax, for all layers")
    mixture = read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        shared=fields.size("shared_intermediate_size", 0, least=0),
        experts=256,
        per_token=8,
        scores="sigmoid",
        normalise=True,
        correction=True,
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=5e6, partial=True, share=rotating / head_dim),
        attention={"qk_norm": True, "qk_norm_width": True},
        mixture=mixture,
    )
