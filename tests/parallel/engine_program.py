"""Run by test_engine.py with virtual CPU devices: an engine's greedy tokens on one of them and on two, with
the experts cut by width or dealt out (tp,ep); a JSON line of the tokens of each way.

    python -m tests.parallel.engine_program qwen3_moe 1,1 2,2
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from lmdeploy_jax.bench import checkpoint
from lmdeploy_jax.engine.core.engine import Engine
from tests.engine.harness import config, tokens
from tests.oracle import save_checkpoint

PROMPTS = [list(range(3, 40)), [9, 8, 7]]


def make(name: str, scratch: Path) -> Path:
    if name == "mxfp4":
        return checkpoint.make("tiny-gpt-oss", scratch, model_format=name)
    return save_checkpoint(name, scratch / name)


def answers(folder: Path, scratch: Path, tp: int, ep: int) -> list[list[int]]:
    how = {"tp": tp, "ep": ep, "dtype": "float32", "cache_max_entry_count": 64e6}
    engine = Engine(folder, config(scratch / "xla", max_prefill_token_num=32, **how), progress=False)
    try:
        return tokens(engine, PROMPTS, max_new_tokens=12)
    finally:
        engine.close()


if __name__ == "__main__":
    kind, *ways = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        path = make(kind, Path(folder))
        found = [answers(path, Path(folder), *map(int, way.split(","))) for way in ways]
    print(json.dumps(found))
