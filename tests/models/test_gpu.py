"""Parity on an NVIDIA GPU, in bfloat16 and with both kernel backends; skipped where there is none."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.engine.core.engine import Engine
from tests.engine.harness import config, tokens
from tests.models.paged import PagedRunner
from tests.oracle import CONFIGS, hf_logits, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
BFLOAT16 = 4e-2  # of the largest logit; the weights' own rounding is 2^-9 in every layer


@pytest.mark.parametrize("backend", ["pallas", "xla"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_logits_are_near_those_of_transformers(name, backend, tmp_path):
    folder = save_checkpoint(name, tmp_path / name)
    ids = np.random.default_rng(1).integers(3, 257, 130).tolist()
    want = hf_logits(folder, ids)
    runner = PagedRunner(load_model(folder, dtype="bfloat16", backend=backend))
    got = np.asarray(runner.ragged([(0, 0, ids, len(ids))])[0], np.float32)
    error = np.abs(got - want[: len(got)])
    assert error.mean() / np.abs(want).max() < BFLOAT16 / 4
    assert error.max() / np.abs(want).max() < BFLOAT16 * 2


def test_both_backends_give_tiny_chat_the_same_tokens(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 2000, n).tolist() for n in (1, 63, 64, 65, 200)]
    answers = []
    for backend in ("xla", "pallas"):
        engine = Engine("tiny-chat", config(tmp_path, backend=backend, dtype="float32"), progress=False)
        answers.append(tokens(engine, prompts))
        engine.close()
    assert answers[0] == answers[1]
