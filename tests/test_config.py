"""Engine configs: LMDeploy's are translated, refused or warned about, field by field."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import pytest

from lmdeploy_jax.config import (
    JaxEngineConfig,
    PytorchEngineConfig,
    TurbomindEngineConfig,
    VisionConfig,
    engine_config,
    with_vision,
)
from lmdeploy_jax.errors import ConfigError

BOTH = [TurbomindEngineConfig, PytorchEngineConfig]
COMMON = {
    "dtype": "float16",
    "tp": 2,
    "session_len": 99,
    "max_batch_size": 7,
    "cache_max_entry_count": 0.5,
    "enable_prefix_caching": False,
    "max_prefill_token_num": 512,
    "revision": "r1",
    "download_dir": "d",
    "hf_overrides": {"a": 1},
    "model_format": "awq",
}


@pytest.mark.parametrize("kind", BOTH)
def test_fields_with_a_meaning_carry_over_silently(kind, caplog):
    assert engine_config(kind(**COMMON)) == JaxEngineConfig(**COMMON)
    assert not caplog.records


@pytest.mark.parametrize("kind", BOTH)
def test_defaults_are_this_engines_defaults(kind, caplog):
    assert engine_config(kind()) == JaxEngineConfig() == engine_config(None)
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TurbomindEngineConfig, "communicator", "native"),
        (TurbomindEngineConfig, "num_tokens_per_iter", 4096),
        (TurbomindEngineConfig, "cache_chunk_size", 2),
        (PytorchEngineConfig, "enable_mp_engine", True),
        (PytorchEngineConfig, "prefill_interval", 4),
        (PytorchEngineConfig, "cudagraph_capture_batch_sizes", [1, 2]),
        (PytorchEngineConfig, "device_type", "cpu"),
    ],
)
def test_a_field_without_a_meaning_warns_by_name(kind, name, value, caplog):
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        assert engine_config(kind(**{name: value})) == JaxEngineConfig()
    (record,) = caplog.records
    assert f"{kind.__name__}.{name}={value!r}" in record.getMessage()


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (TurbomindEngineConfig, "model_format", "gguf"),
        (TurbomindEngineConfig, "quant_policy", 42),
        (TurbomindEngineConfig, "cp", 2),
        (TurbomindEngineConfig, "devices", [1]),
        (TurbomindEngineConfig, "rope_scaling_factor", 2.0),
        (TurbomindEngineConfig, "empty_init", True),
        (TurbomindEngineConfig, "cache_max_entry_count", 100),
        (TurbomindEngineConfig, "cache_block_seq_len", 32),
        (TurbomindEngineConfig, "dtype", "int8"),
        (TurbomindEngineConfig, "attn_tp_size", 2),
        (TurbomindEngineConfig, "device_num", 8),
        (TurbomindEngineConfig, "outer_dp_size", 2),
        (PytorchEngineConfig, "mlp_tp_size", 2),
        (PytorchEngineConfig, "num_cpu_blocks", 3),
        (PytorchEngineConfig, "enable_eplb", True),
        (PytorchEngineConfig, "adapters", {"a": "path"}),
        (PytorchEngineConfig, "block_size", 16),
        (PytorchEngineConfig, "num_gpu_blocks", 100),
        (PytorchEngineConfig, "device_type", "ascend"),
        (PytorchEngineConfig, "logprobs_mode", "raw_logits"),
        (PytorchEngineConfig, "role", "Prefill"),
        (PytorchEngineConfig, "dllm_block_length", 4),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_once(kind, name, value):
    with pytest.raises(ConfigError, match=name):
        kind(**{name: value})
    config = kind()
    object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=name):
        config.to_jax()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TurbomindEngineConfig, {"tp": 2, "attn_tp_size": 2, "mlp_tp_size": 2, "device_num": 2}),
        (TurbomindEngineConfig, {"tp": 2, "cache_block_seq_len": 64}),
        (PytorchEngineConfig, {"tp": 2, "moe_tp_size": 2, "block_size": 64}),
    ],
)
def test_what_is_so_anyway_is_taken_without_a_word(kind, given, caplog):
    assert engine_config(kind(**given)) == JaxEngineConfig(tp=2)
    assert not caplog.records


@pytest.mark.parametrize("kind", [TurbomindEngineConfig, PytorchEngineConfig])
def test_a_language_model_only_is_carried_over(kind, caplog):
    """It was so anyway, until some models took images."""
    assert engine_config(kind(language_model_only=True)) == JaxEngineConfig(language_model_only=True)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("enable_prefix_caching", "no", "True or False"),
        ("eager_mode", 1, "True or False"),
        ("tp", 0, "an integer >= 1"),
        ("tp", True, "an integer >= 1"),
        ("session_len", "8k", "None or an integer >= 1"),
        ("dtype", "int8", "one of auto, float32, float16, bfloat16"),
        ("cache_max_entry_count", 0, "a number > 0"),
        ("cache_max_entry_count", float("nan"), "a number > 0"),
        ("hf_overrides", "x", "None or a dict"),
        ("hf_overrides", {1: 2}, "every key is a text"),
        ("revision", 3, "None or a text"),
        ("download_dir", 5, "None or a text or a PathLike"),
        ("compile_cache_dir", 3, "None or a text or a PathLike"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_named(name, value, text):
    with pytest.raises(ConfigError, match=f"JaxEngineConfig.{name}=.* must be .*{text}"):
        JaxEngineConfig(**{name: value})
    config = JaxEngineConfig()
    with pytest.raises(ConfigError, match=f"JaxEngineConfig.{name}="):
        setattr(config, name, value)
    assert config == JaxEngineConfig()


@pytest.mark.parametrize("kind", BOTH)
def test_lmdeploys_fields_are_checked_alike(kind):
    for name, value in (("enable_prefix_caching", "no"), ("session_len", "8k"), ("revision", 3)):
        with pytest.raises(ConfigError, match=f"{kind.__name__}.{name}="):
            kind(**{name: value})


def test_a_misspelt_field_cannot_be_set():
    config = JaxEngineConfig(download_dir=Path("somewhere"))
    with pytest.raises(AttributeError, match=r"no field 'sesion_len'. Did you mean 'session_len'"):
        config.sesion_len = 5


@pytest.mark.parametrize("kind", BOTH)
def test_every_field_is_carried_refused_or_warned_about(kind):
    """A field outside the two tables warns; the tables may name only fields that exist."""
    names = {f.name for f in fields(kind)}
    assert {*kind._carried.values(), *kind._refused} <= names
    assert set(kind._carried) <= {f.name for f in fields(JaxEngineConfig)}


@pytest.mark.parametrize("kind", [JaxEngineConfig, *BOTH])
def test_an_unknown_field_is_a_type_error(kind):
    with pytest.raises(TypeError, match="sesion_len"):
        kind(sesion_len=5)


def test_another_object_is_no_config():
    with pytest.raises(ConfigError, match="backend_config is a dict"):
        engine_config({"tp": 1})


def test_how_many_images_are_encoded_together():
    assert with_vision(JaxEngineConfig(), None).vision_max_batch_size is None
    assert with_vision(JaxEngineConfig(), VisionConfig()).vision_max_batch_size == 1
    assert with_vision(JaxEngineConfig(tp=2), VisionConfig(8)) == JaxEngineConfig(
        tp=2, vision_max_batch_size=8
    )
    with pytest.raises(ConfigError, match="max_batch_size"):
        VisionConfig(max_batch_size=0)
