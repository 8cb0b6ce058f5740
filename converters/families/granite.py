"""IBM Granite: a Llama with four multipliers; its mixtures, with a shared block or without; Granite 4, in
which most layers are Mamba 2.
"""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.common import FULL, LINEAR, count_layers, mixer_kinds
from lmdeploy_jax.converters.families.llama import llama_config
from lmdeploy_jax.converters.families.mamba import mamba_rules, read_mamba
from lmdeploy_jax.converters.families.mixture import MixtureNames, mixture_rules, read_mixture
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Rows
from lmdeploy_jax.converters.stacked import StackedExperts
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig

GRANITE_STACKED = StackedExperts(
    r".*\.block_sparse_moe", {"input_linear": "gate_up", "output_linear": "down"}, below=".experts"
)


def granite_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteConfig`."""
    return _granite(fields)


def granite_moe_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteMoeConfig` and `GraniteMoeSharedConfig`."""
    return _granite(fields, mixture=_mixture(fields, 0))


def granite_hybrid_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteMoeHybridConfig`; without experts, the shared block is the MLP."""
    mamba = read_mamba(fields, fields.size("mamba_expand", 2) * fields.size("hidden_size"))
    recurrent = mixer_kinds(fields, [LINEAR] * count_layers(fields), {FULL: None, LINEAR: mamba})
    rotates = fields.get("position_embedding_type") == "rope"
    features: dict[str, Any] = {"recurrent": recurrent, "rope_layers": (rotates,) * len(recurrent)}
    if fields.size("num_local_experts", 8, least=0):
        return _granite(fields, mixture=_mixture(fields, 1024), **features)
    fields.get("num_experts_per_tok")
    return _granite(fields, mlp={"width": fields.size("shared_intermediate_size", 1024)}, **features)


def _mixture(fields: Fields, shared: int) -> MixtureConfig:
    return read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        shared=fields.size("shared_intermediate_size", shared, least=0),
        experts=8,
        per_token=2,
        scores="chosen",
    )


def granite_moe_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The shared block stands beside the mixture, or alone, gate and up in one tensor."""
    mixes = any(isinstance(layer.mlp, MixtureConfig) for layer in config.layers)
    shared, target = LAYER + r"shared_mlp\.", LAYER_TARGET + ("mlp.shared." if mixes else "mlp.")
    return (
        *mixture_rules(config, tp, names=MixtureNames("block_sparse_moe", router="router.layer")),
        Rule(shared + r"input_linear\.weight", target + "gate_up.weight", "", Rows(2)),
        Rule(shared + r"output_linear\.weight", target + "down.weight"),
    )


def granite_hybrid_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """Mamba's names beside those of Granite's mixtures."""
    return (*granite_moe_rules(config, tp), *mamba_rules(config, tp, LAYER + r"mamba\."))


def _granite(fields: Fields, **features: Any) -> DecoderConfig:
    return llama_config(
        fields,
        **features,
        scale=fields.number("attention_multiplier", 1.0),
        layer={"residual_multiplier": fields.number("residual_multiplier", 1.0)},
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=1.0 / fields.positive("logits_scaling", 1.0),
    )
