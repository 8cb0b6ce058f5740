"""Which backend an engine takes, by what is asked for and what the device can do."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.cache.kv import plan_memory
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.engine.core.setup import choose_backend
from lmdeploy_jax.errors import ConfigError

CPU = SimpleNamespace(platform="cpu")
GPU = SimpleNamespace(platform="gpu", compute_capability="9.0")
OLD = SimpleNamespace(platform="gpu", compute_capability="7.5")
MODEL = build_config(shapes.read("llama3-8b"), "llama3-8b")


@pytest.mark.parametrize(
    ("wanted", "device", "backend"),
    [
        ("auto", CPU, "xla"),
        ("auto", OLD, "xla"),
        ("auto", GPU, "pallas"),
        ("pallas", GPU, "pallas"),
        ("xla", GPU, "xla"),
    ],
)
def test_choice(wanted, device, backend, caplog):
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        assert choose_backend(wanted, device, MODEL) == backend
    assert ("compute capability 7.5" in caplog.text) == (device is OLD)


def test_a_backend_that_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match=r"the platform is cpu.*'auto' or 'xla'"):
        choose_backend("pallas", CPU, MODEL)


def test_a_cache_too_small_is_told_in_megabytes():
    with pytest.raises(ConfigError) as caught:
        plan_memory(share=1000, free=10**9, reserved=0, page=500_000, most_tokens=4096, on_cpu=True)
    assert "it gives 0.001 MB, and at least 2 pages of 0.500 MB are needed" in str(caught.value)
    assert "-64" not in str(caught.value)
