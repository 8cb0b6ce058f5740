"""Falcon-H1: attention and Mamba 2 side by side in every layer, with a multiplier for each product."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import decoder_config, head_size
from lmdeploy_jax.converters.families.mamba import mamba_rules, read_mamba
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.families.tables import LAYER, LAYER_TARGET, hf_rules
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.layouts import Stack
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.recurrent_config import Mamba2Config

NORMS = {"input_layernorm": "attention_norm", "pre_ff_layernorm": "mlp_norm"}
BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias")


def falcon_h1_config(fields: Fields) -> DecoderConfig:
    """HF `FalconH1Config`. What multiplies attention's input multiplies its scores twice, and its output."""
    for name in BIASES:
        if fields.flag(name, False):
            raise fields.unsupported(name, True, "false")
    head_dim, entering = head_size(fields), fields.number("attention_in_multiplier", 1.0)
    gate, down = _multipliers(fields, "mlp_multipliers", 2)
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim),
        scale=head_dim**-0.5 * entering**2 * fields.number("key_multiplier", 1.0),
        attention={"output_multiplier": entering * fields.number("attention_out_multiplier", 1.0)},
        mlp={"gate_multiplier": gate, "output_multiplier": down},
        layer={"second_mixer": _mamba(fields)},
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        logit_multiplier=fields.number("lm_head_multiplier", 1.0),
    )


def _mamba(fields: Fields) -> Mamba2Config:
    expanded = fields.size("mamba_expand", 2) * fields.size("hidden_size")
    inner = fields.optional_size("mamba_d_ssm", 1024) or expanded
    before = fields.flag("mamba_norm_before_gate", True)
    entering = fields.number("ssm_in_multiplier", 1.0)
    z, x, b, c, dt = (entering * each for each in _multipliers(fields, "ssm_multipliers", 5))
    return read_mamba(
        fields,
        inner,
        norm=("before_gate" if before else "after_gate") if fields.flag("mamba_rms_norm", False) else None,
        input_multipliers=(x, b, c, z, dt),
        output_multiplier=fields.number("ssm_out_multiplier", 1.0),
    )


def _multipliers(fields: Fields, name: str, count: int) -> list[float]:
    found = fields.items(name, [1.0] * count)
    if len(found) != count or not all(type(each) in (int, float) for each in found):
        raise fields.damaged(name, found, f"{count} numbers")
    return [float(each) for each in found]


def falcon_h1_rules(config: DecoderConfig, tp: int) -> tuple[Rule, ...]:
    """HF's names, the MLP's and the last norm's apart."""
    mlp, target = LAYER + r"feed_forward\.", LAYER_TARGET + "mlp."
    both = Stack(("gate", "up"))
    return (
        *hf_rules(config, tp, norms=NORMS),
        *mamba_rules(config, tp, LAYER + r"mamba\.", target="second_mixer"),
        Rule(mlp + r"(gate|up)_proj\.weight", target + "gate_up.weight", r"\2", both),
        Rule(mlp + r"down_proj\.weight", target + "down.weight"),
        Rule(r"model\.final_layernorm\.weight", "norm.weight"),
    )
