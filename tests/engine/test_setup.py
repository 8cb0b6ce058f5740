"""Which backend an engine takes, by what is asked for and what the device can do."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.cache.kv import page_bytes, plan_memory
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.engine.core.setup import _session_len, choose_backend
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import DecoderConfig

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


def with_heads(*sizes: int) -> DecoderConfig:
    layer = MODEL.layers[0]
    mixers = [replace(layer.mixer, head_dim=size) for size in sizes]
    return replace(MODEL, layers=tuple(replace(layer, mixer=mixer) for mixer in mixers))


@pytest.mark.parametrize("wanted", ["auto", "pallas"])
def test_each_kind_of_layer_has_its_backend(wanted, caplog):
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        assert choose_backend(wanted, GPU, with_heads(128, 512, 512)) == "pallas"
    assert caplog.messages == [
        "attention with 32 heads in 8 KV heads of 512 uses xla: head_dim 512 is outside 16 to 256"
    ]


def test_no_layer_with_a_backend_is_no_backend(caplog):
    assert choose_backend("auto", GPU, with_heads(512, 320)) == "xla"
    with pytest.raises(ConfigError, match="head_dim 512 is outside 16 to 256"):
        choose_backend("pallas", GPU, with_heads(512, 320))


def test_a_backend_that_cannot_be_had_is_refused():
    with pytest.raises(ConfigError, match=r"the platform is cpu.*'auto' or 'xla'"):
        choose_backend("pallas", CPU, MODEL)


def test_a_context_beyond_the_model_s_own_is_told(caplog):
    yarn = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}
    stretched = build_config(shapes.read("llama3-8b") | yarn, "llama3-8b")
    for model, length in ((MODEL, 8192), (stretched, 9000), (MODEL, 9000)):
        assert caplog.text == ""
        assert _session_len(JaxEngineConfig(session_len=length), model) == length
    assert "session_len=9000: this model was made for 8192 tokens" in caplog.text


def plan(layout, page, **settings):
    return plan_memory(layout, page, free=10**9, reserved=0, sequences=8, on_cpu=False, **settings)


def test_a_cache_too_small_is_told_in_megabytes():
    layout = MODEL.cache_layout(1, session_len=4096, step_tokens=1024)
    with pytest.raises(ConfigError) as caught:
        plan(layout, 500_000, share=1000, session_len=4096)
    assert "it gives 0.001 MB, and at least 2 pages of 0.500 MB are needed" in str(caught.value)
    assert "-64" not in str(caught.value)


def test_what_images_take_is_no_part_of_the_cache():
    layout = MODEL.cache_layout(1, session_len=16384, step_tokens=8192)
    sizes = [
        plan(layout, 1_000_000, share=0.5, session_len=16384, images=images).cache_bytes
        for images in (0, 400_000_000)
    ]
    assert sizes[0] - sizes[1] == pytest.approx(200_000_000, rel=0.05)


def test_windows_make_room_for_more_tokens_and_the_plan_says_so():
    """Five layers of six with a window of 1,024, in sequences of 16,384 tokens."""
    mixer = MODEL.layers[0].mixer
    near = replace(MODEL.layers[0], mixer=replace(mixer, options=replace(mixer.options, window=1024)))
    windows = replace(MODEL, layers=([near] * 5 + [MODEL.layers[0]]) * 4)
    full = replace(MODEL, layers=MODEL.layers[:24])
    rooms = []
    for model in (full, windows):
        layout = model.cache_layout(1, session_len=16384, step_tokens=8192)
        memory = plan(layout, page_bytes(layout.paged, "bfloat16"), share=0.9, session_len=16384)
        assert f"{memory.room} tokens" in str(memory)
        rooms.append(memory.room)
    assert rooms[1] >= 3 * rooms[0]
