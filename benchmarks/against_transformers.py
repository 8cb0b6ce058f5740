"""Speed on this machine against HuggingFace transformers: python -m benchmarks.against_transformers

Prints JSON lines. Greedy, float32, both on all cores:
  questions    `--requests` held-out questions to `--model` at once, each answered to its own end;
               transformers one by one, and as one padded batch
  concurrent   the same with prompts of nearly one length and `--tokens` tokens each, ends ignored, where a
               padded batch pads nothing
  single       decode at batch 1 on a random checkpoint of `--shape`
  start        seconds from `pipeline()` to the first token of `--model`, the compile cache empty and filled
Each figure is the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Pipeline, assets
from lmdeploy_jax.assets.tasks import TASKS, held_out
from lmdeploy_jax.bench.accuracy import MOST_TOKENS
from lmdeploy_jax.bench.checkpoint import make

PAUSE = 0.3  # seconds before each timing: threads of the one before go on spinning for a while

START = """
import sys, time
begun = time.perf_counter()
from lmdeploy_jax import JaxEngineConfig, pipeline
opened = time.perf_counter()
pipe = pipeline(sys.argv[2], JaxEngineConfig(compile_cache_dir=sys.argv[1]), progress=False)
for piece in pipe.stream_infer("What is 12 + 30?"):
    if piece.token_ids:
        break
now = time.perf_counter()
print(now - opened, now - begun)
"""


def best(repeats: int, function: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    seconds = []
    for _ in range(repeats):
        time.sleep(PAUSE)
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def say(**figures: object) -> None:
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


def hf_generate(
    model: transformers.PreTrainedModel, rows: list[list[int]], count: int, *, ends: bool = False
) -> torch.Tensor:
    """Greedy `generate` for rows of any length, padded on the left; `count` tokens, at most if it `ends`."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model.generation_config.eos_token_id = model.config.eos_token_id if ends else None
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    assert ends or out.shape[1] == width + count
    return out[:, width:]


def load_hf(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def concurrent(model: str, requests: int, count: int, repeats: int) -> None:
    config = GenerationConfig(max_new_tokens=count, ignore_eos=True)
    prompts = [[user(f"What is {11 + i} + {90 - i}?")] for i in range(requests)]
    many("concurrent", model, prompts, config, repeats)


def questions(model: str, requests: int, repeats: int) -> None:
    found = [
        list(e.messages)
        for task in TASKS
        for e in held_out(task, requests, 1)
        if not e.tools and not e.template
    ]
    random.Random(0).shuffle(found)
    many("questions", model, found[:requests], GenerationConfig(max_new_tokens=MOST_TOKENS), repeats)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def many(what: str, name: str, prompts: list[Any], config: GenerationConfig, repeats: int) -> None:
    """Many requests to an embedded model. The three take turns: what else a machine does comes and goes."""
    folder = assets.resolve(name)
    assert folder is not None
    model, count, ends = load_hf(folder), config.max_new_tokens or 0, not config.ignore_eos
    with Pipeline(folder, JaxEngineConfig(enable_prefix_caching=False), progress=False) as pipe:
        tokenizer, template = pipe.tokenizer, pipe.frontend.template
        rows = [tokenizer.encode(template.render(prompt), add_special_tokens=False) for prompt in prompts]
        answers = pipe.infer(prompts, config)
        assert isinstance(answers, list)
        for answer, theirs in zip(answers, hf_generate(model, rows, count, ends=ends).tolist(), strict=True):
            assert answer.token_ids == theirs[: len(answer.token_ids)]
        turns = [
            (
                best(1, lambda: pipe.infer(prompts, config)),
                best(1, lambda: [hf_generate(model, [row], count, ends=ends) for row in rows]),
                best(1, lambda: hf_generate(model, rows, count, ends=ends)),
            )
            for _ in range(repeats)
        ]
    ours, alone, batch = map(min, zip(*turns, strict=True))
    tokens = sum(answer.generate_token_len for answer in answers)
    say(
        what=what,
        model=name,
        requests=len(prompts),
        tokens=tokens,
        ours_tok_s=tokens / ours,
        hf_one_by_one_tok_s=tokens / alone,
        hf_padded_batch_tok_s=tokens / batch,
        over_one_by_one=alone / ours,
        over_padded_batch=batch / ours,
    )


def single(shape: str, count: int, repeats: int, root: Path) -> None:
    """Batch 1 on a random checkpoint: the time of `count` tokens less that of one."""
    folder = make(shape, root)
    prompt = list(range(300, 428))
    engine = JaxEngineConfig(
        session_len=512, max_batch_size=1, max_prefill_token_num=128, enable_prefix_caching=False
    )
    with Pipeline(folder, engine, progress=False) as pipe:

        def ours(n: int) -> object:
            return pipe.infer(prompt, GenerationConfig(max_new_tokens=n, ignore_eos=True))

        ours(2)
        our_step = (best(repeats, lambda: ours(count + 1)) - best(repeats, lambda: ours(1))) / count
    model = load_hf(folder)
    hf_generate(model, [prompt], 2)
    whole = best(repeats, lambda: hf_generate(model, [prompt], count + 1))
    first = best(repeats, lambda: hf_generate(model, [prompt], 1))
    hf_step = (whole - first) / count
    say(
        what="single",
        shape=shape,
        ours_ms=1e3 * our_step,
        hf_ms=1e3 * hf_step,
        speedup=hf_step / our_step,
    )


def start(model: str) -> None:
    """A fresh process each time."""
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("cold", "cached"):
            command = [sys.executable, "-c", START, cache, model]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, with_import = map(float, done.stdout.split())
            say(what="start", cache=kind, seconds=seconds, with_import=with_import)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--what", default="start,questions,concurrent,single")
    parser.add_argument("--model", default="tiny-chat", choices=assets.names(), help="an embedded model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--root", type=Path, default=Path("models"), help="where random checkpoints are kept")
    options = parser.parse_args()
    wanted = options.what.split(",")
    if "start" in wanted:
        start(options.model)
    if "questions" in wanted:
        questions(options.model, options.requests, options.repeats)
    if "concurrent" in wanted:
        concurrent(options.model, options.requests, options.tokens, options.repeats)
    if "single" in wanted:
        single(options.shape, options.tokens // 4, options.repeats, options.root)


if __name__ == "__main__":
    main()
