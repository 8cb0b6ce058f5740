"""Configs of models with recurrent layers: published spellings, and what is refused."""

from __future__ import annotations

import math

import pytest

from lmdeploy_jax.errors import ConfigError, UnsupportedModelError
from lmdeploy_jax.models.recurrent_config import Mamba2Config
from tests.converters.test_families import build

NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "num_hidden_layers": 99}
GRANITE = {"mamba_n_heads": 8, "layer_types": ["mamba", "mamba", "attention", "mamba"]}


def nemotron(**fields):
    return build("NemotronHForCausalLM", **NEMOTRON | fields)


def test_patterns_and_lists_of_both_spellings_mean_the_same():
    new = ["linear_attention", "moe", "full_attention", "mlp"]
    config = nemotron(hybrid_override_pattern="ME*-")
    assert (
        config
        == nemotron(layers_block_type=new)
        == nemotron(layers_block_type=["mamba", "moe", "attention", "mlp"])
    )
    assert [(layer.mixer is None, layer.mlp is None) for layer in config.layers] == [
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert config.ropes == ()
    for limit in ([0.0, math.inf], [0.0, {"__float__": "Infinity"}]):
        assert nemotron(hybrid_override_pattern="ME*-", time_step_limit=limit) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hybrid_override_pattern": "MX*"},
            r"hybrid_override_pattern=\['linear_attention', 'X', .* one of",
        ),
        ({"hybrid_override_pattern": "M-M-"}, "one 'full_attention' at least"),
        (
            {"hybrid_override_pattern": "M*", "time_step_limit": [0.001, 0.1]},
            r"time_step_limit=\[0.001, 0.1\]",
        ),
        ({"hybrid_override_pattern": "M*", "attention_bias": True}, "attention_bias=True"),
        ({"hybrid_override_pattern": "M*", "n_groups": 3}, "n_groups=3 .*a divisor of 8 heads"),
        ({"hybrid_override_pattern": "M*", "mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'"),
    ],
)
def test_what_nemotron_cannot_be_is_named(fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        nemotron(**fields)


def test_granite_names_its_kinds_as_before_transformers_5():
    config = build("GraniteMoeHybridForCausalLM", **GRANITE)
    kinds = [isinstance(mixer, Mamba2Config) for mixer in config.mixers]
    assert kinds == [True, True, False, True]
    assert config.ropes == ()
    assert len(build("GraniteMoeHybridForCausalLM", **GRANITE, position_embedding_type="rope").ropes) == 1


def test_groups_are_repeated_where_devices_outnumber_them_and_no_norm_spans_several():
    one = Mamba2Config(heads=8, groups=1, head_dim=16, state_dim=12, taps=4)
    assert (one.held_groups(4), one.per_group(4), one.cache(4).state) == (4, 2, (8, 12, 16))
    two = Mamba2Config(heads=8, groups=2, head_dim=16, state_dim=12, taps=4)
    with pytest.raises(ConfigError, match=r"tp=4 cannot share out 8 Mamba heads in 2 groups; .* divides 2"):
        two.held_groups(4)


def test_widths_of_lfm2_are_adjusted_unless_they_are_already():
    fields = {"full_attn_idxs": [1], "block_multiple_of": 32}
    config = build("Lfm2ForCausalLM", **fields)
    assert [layer.mlp.width for layer in config.layers] == [64] * 4  # 2 / 3 of 96
    assert config.tie_embeddings
    given = build("Lfm2ForCausalLM", **fields, block_ff_dim=100, block_auto_adjust_ff_dim=False)
    assert given.layers[0].mlp.width == 100
    assert [config.mixers[i].rope is not None for i in range(4)] == [False, True, False, False]
