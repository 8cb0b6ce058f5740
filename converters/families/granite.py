"""IBM Granite: a Llama with four multipliers; its mixtures, with a shared block or without."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.converters.families.llama import llama_config
from lmdeploy_jax.converters.families.mixture import MixtureNames, mixture_rules, read_mixture
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Rows
from lmdeploy_jax.converters.stacked import StackedExperts
from lmdeploy_jax.models.config import DecoderConfig

GRANITE_STACKED = StackedExperts(
    r".*\.block_sparse_moe", {"input_linear": "gate_up", "output_linear": "down"}, below=".experts"
)


def granite_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteConfig`."""
    return _granite(fields)


def granite_moe_config(fields: Fields) -> DecoderConfig:
    """HF `GraniteMoeConfig` and `GraniteMoeSharedConfig`."""
    mixture = read_mixture(
        fields,
        width=fields.size("intermediate_size"),
        shared=fields.size("shared_intermediate_size", 0, least=0),
        experts=8,
        per_token=2,
        scores="chosen",
    )
    return _granite(fields, mixture=mixture)


def granite_moe_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """The shared block stands beside the mixture, gate and up in one tensor."""
    shared, target = LAYER + r"shared_mlp\.", LAYER_TARGET + "mlp.shared."
    return (
        *mixture_rules(config, tp, names=MixtureNames("block_sparse_moe", router="router.layer")),
        Rule(shared + r"input_linear\.weight", target + "gate_up.weight", "", Rows(2)),
        Rule(shared + r"output_linear\.weight", target + "down.weight"),
    )


def _granite(fields: Fields, **features: Any) -> DecoderConfig:
    return llama_config(
        fields,
        **features,
        scale=fields.number("attention_multiplier", 1.0),
        layer={"residual_multiplier": fields.number("residual_multiplier", 1.0)},
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=1.0 / fields.positive("logits_scaling", 1.0),
    )
