"""Run by test_scores.py with virtual CPU devices: how far the scores of an engine on two of them are from
transformers', one JSON line a kind of head.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from lmdeploy_jax import pipeline
from tests.engine.harness import config
from tests.judges import save_classifier, save_judge

TEXTS = ["w3 w77 w5 w11", "w200 w9", "w8 w8 w1 w30 w41 w17 w5"]
TWO = {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (1, 64), "score.2.bias": (1,)}


def errors(scratch: Path) -> dict[str, float]:
    """The largest difference for a head of two layers and for one of one label."""
    oracles = {
        "reward": save_judge("qwen2", scratch / "reward", "Qwen2ForRewardModel", TWO),
        "classifier": save_classifier("qwen3", scratch / "classifier", num_labels=1),
    }
    found = {}
    for name, oracle in oracles.items():
        with pipeline(scratch / name, config(scratch / "xla", tp=2), progress=False) as pipe:
            ids = [pipe.tokenizer.encode(text) for text in TEXTS]
            got = pipe.get_reward_score(ids)
        found[name] = float(np.abs(np.array(got) - [oracle(each)[-1][0] for each in ids]).max())
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump(errors(Path(folder)), sys.stdout)
