"""tiny-moe as it is shipped: right answers of all its experts, as many as its card says, quantised too."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax import GenerationConfig, pipeline
from lmdeploy_jax.assets import TINY_CHAT, TINY_MOE
from lmdeploy_jax.bench.accuracy import accuracy
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.quantise import Job
from tests.engine.harness import config

COUNT = 4  # examples a task; the card's figures are of 50
MARGIN = 0.04
ASKED = {
    "What is 12 + 30?": "42",
    "Spell candle.": "c-a-n-d-l-e",
    "count 8 to 17": "8, 9, 10, 11, 12, 13, 14, 15, 16, 17",
}


def stated() -> float:
    """The mean that the model card states, as a share."""
    found = re.search(r"Mean over the tasks: ([0-9.]+) %", (TINY_MOE / "README.md").read_text())
    assert found, "the model card states no figure"
    return float(found[1]) / 100


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


def test_its_answers_are_right_and_every_expert_works(compile_cache: Path) -> None:
    few = {"max_batch_size": 4, "max_prefill_token_num": 64}  # programs to compile
    settings = config(compile_cache, enable_return_routed_experts=True, **few)
    with pipeline("tiny-moe", settings, progress=False) as pipe:
        found = pipe.infer(list(ASKED), GenerationConfig(max_new_tokens=40, return_routed_experts=True))
    assert [answer.text for answer in found] == list(ASKED.values())
    routes = np.concatenate([np.asarray(answer.routed_experts) for answer in found])
    assert routes.shape[1:] == (4, 2)
    assert (routes[..., 0] != routes[..., 1]).all()
    shares = np.stack(
        [np.bincount(layer.ravel(), minlength=8) / layer.size for layer in routes.swapaxes(0, 1)]
    )
    assert shares.min() > 0.01  # an even share is 0.125
    assert shares.max() < 0.45


@pytest.mark.full
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_it_is_as_good_as_its_card_says(bits: int, compile_cache: Path, tmp_path: Path) -> None:
    """With experts in FP8, made as the checkpoint is read, and of 4 bits, in groups of 64, too."""
    model, changes = TINY_MOE, {"model_format": "fp8"} if bits == 8 else {}
    if bits == 4:
        model = tmp_path / "awq"
        Job("tiny-moe", TINY_MOE, model, Awq(64), None).run()
    with pipeline(model, config(compile_cache, **changes), progress=False) as pipe:
        shares = accuracy(pipe, COUNT)
    assert sum(shares.values()) / len(shares) > stated() - MARGIN, json.dumps(shares)


def test_it_shares_the_tokens_of_tiny_chat() -> None:
    """So that either could draft for the other."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (TINY_MOE / name).read_bytes() == (TINY_CHAT / name).read_bytes()
    assert sum(file.stat().st_size for file in TINY_MOE.iterdir()) < 8e6
