"""tiny-chat answers its held-out prompts as its model card says, through the pipeline that users get."""

import json
import re

import pytest

from lmdeploy_jax import JaxEngineConfig, Pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.bench.accuracy import accuracy

COUNT = 10  # prompts a task; the card's figures are of more
MARGIN = 0.04


def stated() -> float:
    """The mean that the model card states, as a share."""
    found = re.search(r"Mean over the tasks: ([0-9.]+) %", (TINY_CHAT / "README.md").read_text())
    assert found, "the model card states no figure"
    return float(found[1]) / 100


@pytest.mark.parametrize("backend", ["xla", pytest.param("pallas", marks=pytest.mark.gpu)])
def test_tiny_chat_is_as_good_as_its_card_says(backend, tmp_path):
    if backend == "pallas":
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs an NVIDIA GPU")
    config = JaxEngineConfig(backend=backend, eager_mode=True, compile_cache_dir=str(tmp_path))
    with Pipeline("tiny-chat", config, progress=False) as pipe:
        shares = accuracy(pipe, COUNT)
    mean = sum(shares.values()) / len(shares)
    assert mean > stated() - MARGIN, json.dumps(shares)
