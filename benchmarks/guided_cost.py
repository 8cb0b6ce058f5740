"""What guided decoding costs on this machine: python -m benchmarks.guided_cost [--model FOLDER]

All requests at once, exactly `--tokens` tokens each: without a grammar, with one that allows everything, with
a JSON schema, and with one whose strings have a greatest length: near it every token of the vocabulary has to
be tried.
Prints a JSON line for greedy and one for sampled decoding: tokens/s, the median and best of `--repeats`. All
take turns, so that a noisy machine is noisy for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from lmdeploy_jax import GenerationConfig, JaxEngineConfig, Pipeline
from lmdeploy_jax.engine.core.compile import CompileCounter

TAGS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3}


def many(**properties: Any) -> dict[str, Any]:
    """A form for a list of records."""
    record = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": record, "minItems": 100}
    return {"type": "json_schema", "json_schema": {"name": "records", "schema": schema}}


AGE = {"type": "integer", "minimum": 0, "maximum": 120}
FORMATS: dict[str, dict[str, Any] | None] = {
    "free": None,
    "anything": {"type": "regex", "regex": "(?s:.*)"},
    "schema": many(age=AGE, married={"type": "boolean"}, score={"type": "number"}, tags=TAGS),
    "strings": many(name={"type": "string", "maxLength": 40}, age=AGE, tags=TAGS),
}


def speed(pipe: Pipeline, prompts: list[str], config: GenerationConfig) -> float:
    """Tokens per second."""
    begun = time.perf_counter()
    answers = pipe.infer(prompts, config)
    seconds = time.perf_counter() - begun
    assert isinstance(answers, list)
    assert all(answer.finish_reason == "length" for answer in answers)
    return sum(answer.generate_token_len for answer in answers) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny-chat", help="a checkpoint's folder")
    parser.add_argument("--decode_steps", type=int, help="as in JaxEngineConfig")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    prompts = [f"What is {i} + 30?" for i in range(args.requests)]
    engine = JaxEngineConfig(decode_steps=args.decode_steps, session_len=2048)
    with Pipeline(args.model, engine, progress=False) as pipe:
        counter = CompileCounter()
        for sampled in (False, True):
            found: dict[str, list[float]] = {name: [] for name in FORMATS}
            for _ in range(args.repeats + 1):
                for name, form in FORMATS.items():
                    config = GenerationConfig(
                        max_new_tokens=args.tokens,
                        ignore_eos=True,
                        response_format=form,
                        do_sample=sampled,
                        random_seed=1,
                    )
                    found[name].append(speed(pipe, prompts, config))
            figures: dict[str, Any] = {
                name: {"median": round(statistics.median(values[1:])), "best": round(max(values[1:]))}
                for name, values in found.items()
            }
            print(json.dumps({"sampled": sampled, **figures, "compilations": counter.count}), flush=True)


if __name__ == "__main__":
    main()
