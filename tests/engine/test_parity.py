"""Greedy tokens of the whole engine equal those of transformers, family by family."""

import pytest

from lmdeploy_jax.engine.core.engine import Engine
from tests.engine.conftest import COUNT
from tests.engine.harness import config, tokens
from tests.oracle import hf_greedy, save_checkpoint

FAMILIES = (
    "llama_mqa",
    "llama_dynamic",
    "mistral_window",
    "qwen2",
    "qwen3_everything",
    "internlm2_dynamic",
    "internlm3",
    "phi3_longrope",
    "deepseek_v3",
)
VARIANTS = (
    "llama_llama3",
    "llama_head80",
    "yi",
    "qwen2_window",
    "qwen3",
    "qwen3_moe",
    "gpt_oss",
)  # their logits: tests/models


def test_llama(engine, prompts, expected):
    assert tokens(engine, prompts) == expected


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(v, marks=pytest.mark.full) for v in VARIANTS)])
def test_family(name, tmp_path, compile_cache, prompts):
    folder = save_checkpoint(name, tmp_path / name)
    engine = Engine(folder, config(compile_cache), progress=False)
    try:
        ours = tokens(engine, prompts)
    finally:
        engine.close()
    assert ours == [hf_greedy(folder, prompt, COUNT) for prompt in prompts]
