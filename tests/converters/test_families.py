"""config.json -> DecoderConfig: old and new spellings, and refusals that name the field and its value."""

from __future__ import annotations

import logging

import pytest

from lmdeploy_jax.converters.families import FAMILIES, MODEL_TYPES, build_config
from lmdeploy_jax.errors import CheckpointError, ConfigError, UnsupportedModelError
from lmdeploy_jax.models.config import DecoderConfig

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 4096,
}


def build(architecture: str = "LlamaForCausalLM", **fields: object) -> DecoderConfig:
    return build_config({**BASE, "architectures": [architecture], **fields}, "config.json")


def windows(config: DecoderConfig) -> tuple[int | None, ...]:
    return tuple(layer.mixer.options.window for layer in config.layers)


def test_old_and_new_rope_fields_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    length = {"original_max_position_embeddings": 512}
    old = build(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **scaling, **length})
    older = build(rope_theta=500000, rope_scaling={"type": "llama3", **scaling, **length})
    new = build(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling, **length})
    assert old == older == new
    (rope,) = new.ropes
    assert (rope.kind, rope.theta, rope.original_max_position) == ("llama3", 500000.0, 512)


def test_yarn_and_longrope_derive_what_is_left_out():
    yarn = build(
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    ).ropes[0]
    assert yarn.attention_factor == pytest.approx(1.1386294)
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate) == (32.0, 1.0, True)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = build(
        "Phi3ForCausalLM", rope_scaling={"type": "su", **factors}, original_max_position_embeddings=256
    ).ropes[0]
    assert (phi.kind, phi.factor, phi.depends_on_length) == ("longrope", 16.0, True)
    assert phi.attention_factor == pytest.approx(1.2247449)


def test_windows_come_from_every_spelling():
    assert windows(build("MistralForCausalLM", sliding_window=None)) == (None,) * 4
    assert windows(build("MistralForCausalLM")) == (4096,) * 4
    some = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    assert windows(build("Qwen2ForCausalLM", **some)) == (None, None, None, 9)
    assert windows(build("Qwen2ForCausalLM", **some | {"use_sliding_window": False})) == (None,) * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(build("Qwen3ForCausalLM", **some, layer_types=types)) == (9, None) * 2
    assert windows(build("Gemma2ForCausalLM", sliding_window=5)) == (5, None) * 2


def test_gemma3_reads_both_ropes_from_old_and_new_fields():
    old = build(
        "Gemma3ForCausalLM",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=512,
        sliding_window_pattern=3,
    )
    new = build(
        "Gemma3ForCausalLM",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        sliding_window=512,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )
    assert old == new
    assert windows(old) == (512, 512, None, 512)
    local, full = old.ropes
    assert [layer.mixer.rope for layer in old.layers] == [local, local, full, local]
    assert (full.kind, full.theta) == ("linear", 1e6)
    assert (local.kind, local.theta) == ("default", 1e4)


def test_sizes_that_are_left_out_are_derived():
    config = build(num_key_value_heads=None)
    mixer = config.layers[0].mixer
    assert (mixer.kv_heads, mixer.head_dim, mixer.options.scale) == (4, 16, 0.25)
    assert build("Qwen3ForCausalLM").layers[0].mixer.head_dim == 128
    assert build(seq_length=1024).max_position == 1024
    assert build(max_position_embeddings=None).max_position == 2048


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type='spiral' is not supported"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [4, 4]}},
            "mrope_section in rope",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not supported; supported: one of silu"),
        ({"rope_parameters": {"factor": 2.0}}, "factor in rope_parameters needs a rope_type other than"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"clip_qkv": True}, "clip_qkv=True"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(fields, message):
    with pytest.raises(UnsupportedModelError, match=r"config\.json: ") as caught:
        build(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types="),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "4 entries"),
        ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            "short_factor=None",
        ),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters="),
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(architecture, fields, message):
    with pytest.raises(UnsupportedModelError) as caught:
        build(architecture, **fields)
    assert message in str(caught.value)


def test_an_unknown_architecture_is_named_with_those_that_are_known():
    with pytest.raises(
        UnsupportedModelError, match="architecture MambaForCausalLM is not supported"
    ) as caught:
        build("MambaForCausalLM")
    assert all(name in str(caught.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": None}, "architectures is None and model_type None tells no architecture"),
        ({"architectures": [], "model_type": "gemma3"}, "model_type 'gemma3' tells no architecture"),
        ({"architectures": [["LlamaForCausalLM"]]}, "must be a list of class names"),
        ({"architectures": {"a": 1}}, "must be a list of class names"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters: factor is missing"),
        ({"hidden_size": [64]}, "hidden_size is [64]"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648; it must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be at most 10000"),
        ({"num_attention_heads": 2**30}, "num_attention_heads is 1073741824"),
        ({"vocab_size": 10**9, "hidden_size": 10**6}, "hidden_size=1000000 and vocab_size ask for a weight"),
        ({"head_dim": 10**9, "hidden_size": 10**6}, "hidden_size=1000000 and head_dim ask for a weight"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1.0; it must be a number above 0"),
        ({"rope_theta": 10**400}, "it must be a finite number"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be a number above 0"),
        ({"rope_theta": True}, "rope_theta is True; it must be a number"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type=['yarn'] is not supported"),
        (
            {"rope_scaling": {"type": "yarn"}, "rope_theta": 1},
            "rope_theta is 1.0; it must be above 1 for yarn",
        ),
        ({"head_dim": 15}, "head_dim=15 is not supported"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings is '512'"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu'] is not supported"),
    ],
)
def test_a_damaged_config_is_named(fields, message):
    with pytest.raises(CheckpointError) as caught:
        build(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Qwen2ForCausalLM", {"layer_types": 3}, "layer_types is 3; it must be a list"),
        ("Qwen2ForCausalLM", {"layer_types": [["full_attention"]] * 4}, "layer_types="),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "max_window_layers": "3"},
            "max_window_layers is '3'; it must be an integer of at least 0",
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": {"a": 1}}, "no_rope_layers is {'a': 1}; it must be a list"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, [], 1]}, "no_rope_layers=[1, 0, [], 1]"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0.0"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": "x"}, "rope_local_base_freq is 'x'"),
        ("GraniteForCausalLM", {"logits_scaling": 0}, "logits_scaling is 0.0"),
        (
            "Phi3ForCausalLM",
            {"rope_scaling": {"type": "longrope", "short_factor": ["1"] * 8, "long_factor": [1.0] * 8}},
            "short_factor: 0 is '1'",
        ),
        (
            "Phi3ForCausalLM",
            {"partial_rotary_factor": -0.5},
            "partial_rotary_factor=-0.5 is not supported",
        ),
    ],
)
def test_a_damaged_field_of_one_family_is_named(architecture, fields, message):
    with pytest.raises(CheckpointError) as caught:
        build(architecture, **fields)
    assert message in str(caught.value)


def test_deep_and_long_values_are_cut_short_in_errors():
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 10**6, list(range(10**6))):
        with pytest.raises(CheckpointError) as caught:
            build(hidden_size=value)
        assert len(str(caught.value)) < 400


def test_without_architectures_the_model_type_decides():
    expected = build("Qwen3ForCausalLM", model_type="qwen3")
    for named in ({}, {"architectures": None}, {"architectures": []}):
        assert build_config({**BASE, "model_type": "qwen3", **named}, "config.json") == expected
    both = ["Qwen3Custom", "Qwen3ForCausalLM"]
    assert build_config({**BASE, "architectures": both}, "config.json") == expected
    assert build_config({**BASE, "architectures": "Qwen3ForCausalLM"}, "config.json") == expected
    by_another_name = {"PhiMoEForCausalLM", "ExaoneMoEForCausalLM"}
    assert set(MODEL_TYPES.values()) == set(FAMILIES) - by_another_name


def test_fields_that_nobody_knows_are_logged_and_off_switches_ignored(caplog):
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        build(_name_or_path="x", use_cache=True, attention_sink=None, num_experts=0, favourite_colour="blue")
    assert [record.message for record in caplog.records] == [
        "config.json: fields without a meaning here are ignored: favourite_colour"
    ]


def test_sequences_that_an_index_would_thin_out_are_refused():
    config = build("DeepseekV32ForCausalLM", q_lora_rank=8, index_topk=512)
    assert config.check_length(None) == config.check_length(512) == 512
    with pytest.raises(
        ConfigError, match=r"session_len=513: of more than 512 tokens .* choose a session_len of"
    ):
        config.check_length(513)
    assert build().check_length(None) == 4096
    assert build().check_length(9999) == 9999
