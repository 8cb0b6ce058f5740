"""Logits equal those of transformers for every family and feature, loaded as users load them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax.converters.load import load_model
from tests.models.paged import PagedRunner
from tests.oracle import CONFIGS, hf_greedy, hf_logits, save_checkpoint

LONG, SHORT, DECODED = 130, 37, 3
PROMPT, GREEDY = 70, 32
# Whose greedy tokens are held against transformers' here; those of the others are in tests/engine.
GREEDY_NAMES = tuple(CONFIGS)[tuple(CONFIGS).index("gemma4") : tuple(CONFIGS).index("internlm3_dynamic")]
# Where the decode step differs in more than sizes. The others decode in chunks of one token.
DECODE_PROGRAM = {
    "llama",
    "llama_head80",
    "llama_dynamic",
    "mistral_window",
    "qwen3_everything",
    "phi3_longrope",
    "smollm3",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4_moe",
    "gpt_oss",
    "llama4",
    "minimax_m2",
    "hunyuan",
    "ministral3",
    "cohere2",
    "qwen3_next",
    "qwen3_5",
    "nemotron_h",
    "falcon_h1",
    "lfm2",
    "deepseek_v2",
    "deepseek_v3",
}
TOLERANCE = 1e-4


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst < TOLERANCE, f"relative error {worst:.2e}"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def decode(runner: PagedRunner, name: str, tokens: dict[int, tuple[int, int]]) -> dict[int, np.ndarray]:
    if name in DECODE_PROGRAM:
        return runner.decode(tokens)
    chunks = [(row, position, [token], 0) for row, (token, position) in tokens.items()]
    return {row: logits[0] for row, logits in zip(tokens, runner.ragged(chunks), strict=True)}


def folder_of(name: str, checkpoints: Path) -> Path:
    folder = checkpoints / name
    return folder if folder.exists() else save_checkpoint(name, folder)


@cache
def runner_of(folder: Path) -> PagedRunner:
    """Whose compiled programs tests share."""
    return PagedRunner(load_model(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, checkpoints):
    folder = folder_of(name, checkpoints)
    rng = np.random.default_rng(1)
    long, short = (rng.integers(3, 257, n + DECODED).tolist() for n in (LONG, SHORT))
    want = {0: hf_logits(folder, long, LONG), 1: hf_logits(folder, short, SHORT)}
    runner = runner_of(folder)

    whole = runner.ragged([(0, 0, long[:LONG], LONG), (1, 0, short[:SHORT], SHORT)])
    assert_close(whole[0], want[0][:LONG])
    assert_close(whole[1], want[1][:SHORT])

    for i in range(DECODED):
        got = decode(runner, name, {0: (long[LONG + i], LONG + i), 1: (short[SHORT + i], SHORT + i)})
        assert_close(got[0], want[0][LONG + i])
        assert_close(got[1], want[1][SHORT + i])

    # A third sequence: the long prompt again, cut at a page's edge and on both sides of it.
    first = 0
    for count in (63, 1, 1, LONG - 65):
        (got,) = runner.ragged([(2, first, long[first : first + count], LONG)])
        assert_close(got, want[0][first : first + count])
        first += count


@pytest.mark.parametrize("name", GREEDY_NAMES)
def test_greedy_tokens_equal_transformers(name, checkpoints):
    folder = folder_of(name, checkpoints)
    ids = np.random.default_rng(2).integers(3, 257, PROMPT).tolist()
    runner = runner_of(folder)
    (logits,) = runner.ragged([(0, 0, ids, PROMPT)])
    drawn = [int(logits[-1].argmax())]
    while len(drawn) < GREEDY:
        at = PROMPT + len(drawn) - 1
        drawn.append(int(decode(runner, name, {0: (drawn[-1], at)})[0].argmax()))
    assert drawn == hf_greedy(folder, ids, GREEDY)
