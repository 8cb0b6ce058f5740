"""`return_routed_experts`: the experts that transformers chooses, of every token but the last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.core.setup import set_up
from lmdeploy_jax.engine.io.params import sampling_params
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.collectors import ExpertLoad
from tests.engine.harness import config, generate
from tests.engine.test_params import LIMITS
from tests.oracle import save_checkpoint

PROMPTS = [[5, 6, 7], list(range(3, 103))]  # in one chunk, and in several


def chosen(folder: Path, ids: list[int], k: int) -> np.ndarray:
    """i32 [tokens, layers with experts, k], in order of the experts' numbers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    found = [each.topk(k, dim=-1).indices.sort(dim=-1).values.numpy() for each in logits]
    return np.stack(found, axis=1)


def test_the_experts_of_every_token_but_the_last_are_told(tmp_path: Path, compile_cache: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "qwen3_moe")
    options = {"enable_return_routed_experts": True, "max_prefill_token_num": 64, "decode_steps": 2}
    engine = Engine(folder, config(compile_cache, **options), progress=False)
    try:
        plain = generate(engine, PROMPTS, max_new_tokens=6)
        told = generate(engine, [*PROMPTS, PROMPTS[1]], max_new_tokens=6, routes=True)
        (states,) = generate(engine, PROMPTS[:1], max_new_tokens=2, hidden="all")
    finally:
        engine.close()
    assert np.concatenate([out.hidden for out in states[0].outputs]).shape == (4, 64)
    assert [each[0].tokens for each in told] == [each[0].tokens for each in [*plain, plain[1]]]
    for prompt, (result,) in zip([*PROMPTS, PROMPTS[1]], told, strict=True):
        routes = np.concatenate([out.routes for out in result.outputs if out.routes is not None])
        ids = [*prompt, *result.tokens[:-1]]
        assert (routes.shape, routes.dtype) == ((len(ids), 3, 3), np.int32)
        assert (routes[:, 0] == -1).all(), "the first layer has no experts"
        assert np.array_equal(np.sort(routes[:, 1:], axis=2), chosen(folder, ids, 3))


def test_it_is_refused_where_it_cannot_be_told(llama: Path, compile_cache: Path) -> None:
    with pytest.raises(ConfigError, match="this model has no mixtures of experts"):
        set_up(llama, config(compile_cache, enable_return_routed_experts=True), progress=False)
    asked = GenerationConfig(return_routed_experts=True)
    with pytest.raises(RequestError, match="start it with enable_return_routed_experts=True"):
        sampling_params(asked, [1, 2], LIMITS, frozenset())
    assert sampling_params(asked, [1, 2], replace(LIMITS, reports_routes=True), frozenset()).routes


def test_the_load_of_each_expert_is_a_metric() -> None:
    load = ExpertLoad("lmdeploy_jax:expert_tokens", "tokens", {"model_name": "m"})
    for routes in ([[[-1, -1], [0, 2]], [[-1, -1], [2, 3]]], [[[-1, -1], [2, 0]]]):
        load.observe(np.array(routes, np.int32))
    (family,) = load.collect()
    found = {(each.labels["layer"], each.labels["expert"]): each.value for each in family.samples}
    assert found == {("1", "0"): 2, ("1", "2"): 3, ("1", "3"): 1}
