"""How far two versions of this project are apart in their logits, on one machine:

    python -m benchmarks.logits BEFORE AFTER tiny-chat --dtype bfloat16

BEFORE and AFTER are checkouts. Each answers fixed prompts greedily in a process of its own; the logits of
both are compared up to and with the first token in which they differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

PROMPTS = ("2", "What is 12 + 30?", "Count from 1 to 20. " * 40, "Ann is 30 years old. Bob is 7. " * 60)
TOKENS = 48


def answer(model: str, dtype: str, out: str) -> None:
    """In the process of one version: the logits of each prompt's answer, to a file."""
    from lmdeploy_jax import GenerationConfig, JaxEngineConfig, pipeline

    wish = GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, output_logits="generation")
    found = {}
    with pipeline(model, JaxEngineConfig(dtype=dtype, eager_mode=True)) as pipe:
        for i, response in enumerate(pipe(list(PROMPTS), gen_config=wish)):
            found[f"tokens {i}"] = np.asarray(response.token_ids)
            found[f"logits {i}"] = np.asarray(response.logits, np.float32)
    np.savez(out, **found)


def run(checkout: Path, model: str, dtype: str, out: str) -> dict[str, np.ndarray]:
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, __file__, "--answer", model, dtype, out]
    subprocess.run(command, env=environment, cwd=Path(out).parent, check=True)
    return dict(np.load(out))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("model", nargs="?", default="tiny-chat")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        old, new = (
            run(checkout.resolve(), args.model, args.dtype, f"{scratch}/{name}.npz")
            for name, checkout in (("before", args.before), ("after", args.after))
        )
    for i in range(len(PROMPTS)):
        differ = np.flatnonzero(old[f"tokens {i}"] != new[f"tokens {i}"])
        alike = int(differ[0]) if len(differ) else TOKENS
        compared = slice(min(alike + 1, TOKENS))
        logits, other = old[f"logits {i}"][compared], new[f"logits {i}"][compared]
        gap, most = np.abs(logits - other).max(), np.abs(logits).max()
        print(f"prompt {i}: {alike} of {TOKENS} tokens alike, logits to {most:.4g}, gap {gap:.4g}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:])
    else:
        main()
