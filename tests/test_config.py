"""Engine configs: LMDeploy's are translated, refused or warned about, field by field."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest

from lmdeploy_jax.config import JaxEngineConfig, PytorchEngineConfig, TurbomindEngineConfig, engine_config
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
        (TurbomindEngineConfig, "model_format", "awq"),
        (TurbomindEngineConfig, "quant_policy", 8),
        (TurbomindEngineConfig, "dp", 2),
        (TurbomindEngineConfig, "cp", 2),
        (TurbomindEngineConfig, "devices", [1]),
        (TurbomindEngineConfig, "rope_scaling_factor", 2.0),
        (TurbomindEngineConfig, "empty_init", True),
        (TurbomindEngineConfig, "cache_max_entry_count", 100),
        (TurbomindEngineConfig, "cache_block_seq_len", 32),
        (TurbomindEngineConfig, "dtype", "int8"),
        (PytorchEngineConfig, "adapters", {"a": "path"}),
        (PytorchEngineConfig, "ep", 2),
        (PytorchEngineConfig, "block_size", 16),
        (PytorchEngineConfig, "num_gpu_blocks", 100),
        (PytorchEngineConfig, "device_type", "ascend"),
        (PytorchEngineConfig, "logprobs_mode", "raw_logits"),
        (PytorchEngineConfig, "role", "Prefill"),
        (PytorchEngineConfig, "dllm_block_length", 4),
    ],
)
def test_what_cannot_be_honoured_is_refused_at_once(kind, name, value):
    with pytest.raises(ConfigError, match="cache_block_seq_len" if name == "block_size" else name):
        kind(**{name: value})


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
