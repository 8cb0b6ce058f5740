"""Trains tiny-chat: `python -m lmdeploy_jax.assets.train --out DIR --minutes 60`.

Needs torch and transformers; runs on a GPU or a CPU. The learning rate follows the clock, so that a run of any length
ends with a decayed rate. Data is generated on the fly, so no conversation is seen twice but by chance.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from . import tasks
from .tokenizer import train_tokenizer

POOL = 256  # conversations sorted by length before they are cut into batches
IGNORED = -100


@dataclass(frozen=True)
class Options:
    """`minutes` of training wall time; `batch_tokens` padded tokens in a batch; `rate` the peak learning rate."""

    out: Path
    minutes: float = 60.0
    batch_tokens: int = 2560
    rate: float = 2e-3
    warmup: float = 0.01
    hold: float = 0.35
    seed: int = 0
    snapshot_minutes: float = 20.0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 of 3M parameters in float32."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def render(tokenizer: PreTrainedTokenizerFast, item: tasks.Conversation | tasks.Example, prompt: bool) -> str:
    """The text of a conversation; with `prompt`, ready for the next answer."""
    tools = list(item.tools) if item.tools else None
    text = tokenizer.apply_chat_template(
        list(item.messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **item.template
    )
    return str(text)


def targets(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """`ids` with everything but the assistant's words (and its end of turn) ignored."""
    opening = tokenizer.encode("<|im_start|>assistant\n")
    labels, inside = [IGNORED] * len(ids), False
    for index, token in enumerate(ids):
        if inside:
            labels[index] = token
            inside = token != tokenizer.eos_token_id
        elif ids[index + 1 - len(opening) : index + 1] == opening:
            inside = True
    return labels


def batches(tokenizer: PreTrainedTokenizerFast, options: Options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), each [B, T] int64, of conversations of like length."""
    rng = random.Random(options.seed)
    while True:
        texts = [render(tokenizer, tasks.training_conversation(rng), False) for _ in range(POOL)]
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        cuts: list[list[list[int]]] = [[]]
        for row in rows:
            if (len(cuts[-1]) + 1) * len(row) > options.batch_tokens and cuts[-1]:
                cuts.append([])
            cuts[-1].append(row)
        rng.shuffle(cuts)
        yield from (padded(tokenizer, cut, options.device) for cut in cuts)


def padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    labels = [targets(tokenizer, row) + [IGNORED] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the target tokens; logits are computed for these positions only."""
    wanted = labels[:, 1:] != IGNORED
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def optimizers(model: Qwen3ForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (https://kellerjordan.github.io/posts/muon), AdamW for the rest."""
    named = dict(model.named_parameters())
    inner = [value for name, value in named.items() if value.ndim == 2 and "layers" in name]
    outer = [value for name, value in named.items() if not (value.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(inner, lr=options.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate_at(progress: float, options: Options) -> float:
    """Warm-up, a plateau, then linear decay to zero at progress 1."""
    if progress < options.warmup:
        return options.rate * (progress + 1e-3) / (options.warmup + 1e-3)
    return options.rate * min(1.0, max(0.0, (1 - progress) / (1 - options.hold)))


def step(model: Qwen3ForCausalLM, steppers: list[torch.optim.Optimizer], batch: Any, rate: float) -> float:
    loss = loss_of(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: Options) -> dict[str, float]:
    """Train in place for the given minutes; returns {steps, tokens (without padding), minutes}."""
    steppers, start, seen, recent = optimizers(model, options), time.monotonic(), 0, 0.0
    next_snapshot = options.snapshot_minutes
    for index, batch in enumerate(batches(tokenizer, options)):
        minutes = (time.monotonic() - start) / 60
        if minutes >= options.minutes:
            break
        rate = rate_at(minutes / options.minutes, options)
        recent = 0.95 * recent + 0.05 * step(model, steppers, batch, rate)
        seen += int((batch[0] != tokenizer.pad_token_id).sum())
        if index % 50 == 0:
            print(f"step {index} {minutes:.1f} min {seen / 1e6:.2f}M tokens rate {rate:.1e} loss {recent:.4f}", flush=True)
        if minutes >= next_snapshot:
            next_snapshot += options.snapshot_minutes
            print(report(evaluate(model, tokenizer, 12)), flush=True)
            save(model, tokenizer, options.out.with_name(options.out.name + "-snapshot"))
    return {"steps": index, "tokens": seen, "minutes": minutes}


@torch.no_grad()
def answers(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], limit: int) -> list[str]:
    """Greedy continuations, one padded batch."""
    encoded = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(
        **encoded.to(model.device), max_new_tokens=limit, do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    cut = output[:, encoded["input_ids"].shape[1] :]
    return [text.split("<|im_end|>")[0].replace("<|endoftext|>", "") for text in tokenizer.batch_decode(cut)]


def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> dict[str, float]:
    """Share of exactly right answers to held-out prompts, per task."""
    model.eval()
    shares = {}
    for task in tasks.TASKS:
        examples = tasks.held_out(task, count, seed)
        outputs = answers(model, tokenizer, [render(tokenizer, example, True) for example in examples], 80)
        grades = [tasks.grade(example, output) for example, output in zip(examples, outputs, strict=True)]
        for example, output, right in zip(examples, outputs, grades, strict=True):
            if not right:
                print(f"  {task}: {example.messages[-1]['content']!r} -> {output!r}, not {example.answer!r}", flush=True)
        shares[task] = sum(grades) / len(grades)
    model.train()
    return shares


def report(shares: dict[str, float]) -> str:
    overall = sum(shares.values()) / len(shares)
    return f"exact match {overall:.4f} " + json.dumps({task: round(share, 3) for task, share in shares.items()})


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint as transformers does, with tokenizer and chat template."""
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    rounded.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Any version of transformers knows this class name.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def options_from_flags() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Options.minutes)
    parser.add_argument("--batch-tokens", type=int, default=Options.batch_tokens)
    parser.add_argument("--rate", type=float, default=Options.rate)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--snapshot-minutes", type=float, default=Options.snapshot_minutes)
    parser.add_argument("--device", default=Options.device)
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = options_from_flags()
    tokenizer = train_tokenizer(options.seed)
    model = new_model(tokenizer, options.seed).to(options.device)
    print(json.dumps(train(model, tokenizer, options)), flush=True)
    print("float32:", report(evaluate(model, tokenizer, 50, seed=1)), flush=True)
    save(model, tokenizer, options.out)
    rounded = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(options.device)
    print("saved bfloat16:", report(evaluate(rounded, tokenizer, 50, seed=1)), flush=True)


if __name__ == "__main__":
    main()
