"""MLPs that are not gated: Swiss AI's Apertus (xIELU, norms of q and k), Arcee's AFM (relu2)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.llama import llama_config
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Scalars
from lmdeploy_jax.models.config import DecoderConfig

NORMS: Mapping[str, str] = {"attention_layernorm": "attention_norm", "feedforward_layernorm": "mlp_norm"}
ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PLAIN = ("up_proj", "down_proj")
arcee_rules = partial(hf_rules, plain_mlp=PLAIN)


def apertus_config(fields: Fields) -> DecoderConfig:
    """HF `ApertusConfig`."""
    head_dim = head_size(fields)
    fields.require("hidden_act", {"xielu": "xielu"}, "xielu")
    bias = fields.flag("attention_bias", False)
    given = fields.table("rope_scaling") or fields.table("rope_parameters") or ROPE
    rope = read_rope(Fields({**fields.raw, "rope_scaling": given}, fields.where), head_dim, theta=12e6)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=rope,
        attention={"qkv_bias": bias, "o_bias": bias, "qk_norm": True},
        mlp={"gated": False, "activation": "xielu"},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )


def apertus_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The usual names beside those of xIELU's numbers."""
    activation = LAYER + r"mlp\.act_fn\."
    return (
        *hf_rules(config, tp, norms=NORMS, plain_mlp=PLAIN),
        Rule(activation + r"(alpha_p|alpha_n)", LAYER_TARGET + r"mlp.activation.\2"),
        Rule(activation + r"(beta|eps)", LAYER_TARGET + r"mlp.activation.\2", "", Scalars()),
    )


def arcee_config(fields: Fields) -> DecoderConfig:
    """HF `ArceeConfig`."""
    activation = fields.require("hidden_act", {"relu2": "relu2"}, "relu2")
    mlp = {"gated": False, "activation": activation}
    return llama_config(fields, mlp=mlp, norm_eps=fields.positive("rms_norm_eps", 1e-5))
