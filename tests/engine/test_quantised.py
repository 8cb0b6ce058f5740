"""A quantised model from the user's side: `model_format` reaches the weights, and the answers stay."""

from __future__ import annotations

import pytest

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, pipeline
from lmdeploy_jax.errors import ConfigError


def test_tiny_chat_in_fp8_still_adds() -> None:
    config = JaxEngineConfig(
        session_len=128,
        max_batch_size=2,
        cache_max_entry_count=16e6,
        eager_mode=True,
        compile_cache_dir="",
        model_format="fp8",
    )
    with pipeline("tiny-chat", config, progress=False) as pipe:
        (answer,) = pipe(["What is 12 + 30?"], GenerationConfig(max_new_tokens=8))
    assert answer.text == "42"


def test_a_format_that_there_is_not_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(
        ConfigError, match="model_format='gguf' is invalid: it must be None or one of hf, awq, gptq"
    ):
        JaxEngineConfig(model_format="gguf")  # type: ignore[arg-type]
