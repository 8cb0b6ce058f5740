"""Trains tiny-chat or tiny-moe: `python -m lmdeploy_jax.assets.train --model NAME --out DIR --minutes 60`.

Needs torch and transformers; runs on a GPU or a CPU. The learning rate follows the clock, so that a run
of any length ends with a decayed rate. Data is generated on the fly: no conversation comes twice
but by chance. On a CPU, one thread a process and a process a core get the most out of it:
`OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m lmdeploy_jax.assets.train …` averages their gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedTokenizerFast

from . import tasks
from .train_models import SHAPES, Model, hidden_states, new_model, tokenizer_of, trainable

POOL = 0.1  # conversations for each of a batch's tokens: so many are sorted by length before they are cut
IGNORED = -100

log = functools.partial(print, flush=True)

Batch = tuple[torch.Tensor, torch.Tensor]
Shares = dict[str, float]


@dataclass(frozen=True)
class Options:
    """`minutes` of training, `batch_tokens` padded tokens in a batch, `rate` the peak learning rate.

    `warmup` and `hold` are the shares of the time after which the rate has risen, and begins to fall;
    `workers` the processes that make the data (0: the training process itself); `init` a checkpoint of this
    script to go on from, with its tokenizer.
    """

    out: Path
    minutes: float = 60.0
    batch_tokens: int = 2560
    rate: float = 3e-3
    warmup: float = 0.01
    hold: float = 0.4
    seed: int = 0
    workers: int = 0
    model: str = "tiny-chat"
    init: Path | None = None
    snapshot_minutes: float = 22.0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def render(tokenizer: PreTrainedTokenizerFast, item: tasks.Conversation | tasks.Example, prompt: bool) -> str:
    """The text of a conversation; with `prompt`, ready for the next answer."""
    tools: list[Any] | None = list(item.tools) if item.tools else None
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


def batches(tokenizer: PreTrainedTokenizerFast, options: Options, worker: int = 0) -> Iterator[Batch]:
    """Endless (ids, labels), each [B, T] int64, of conversations of like length."""
    rng = random.Random(f"{options.seed}/{rank()}/{worker}")
    while True:
        texts = [
            render(tokenizer, tasks.training_conversation(rng), False)
            for _ in range(int(POOL * options.batch_tokens))
        ]
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        cuts: list[list[list[int]]] = [[]]
        for row in rows:
            if (len(cuts[-1]) + 1) * len(row) > options.batch_tokens and cuts[-1]:
                cuts.append([])
            cuts[-1].append(row)
        rng.shuffle(cuts)
        yield from (padded(tokenizer, cut) for cut in cuts)


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: float) -> float:
    """The first process's value, in every process."""
    shared = torch.tensor([value], dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    return float(shared)


def average_gradients(model: Model) -> None:
    """Over all processes, in one transfer."""
    if not dist.is_initialized():
        return
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class Stream(torch.utils.data.IterableDataset[Batch]):
    """`batches`, made in the DataLoader's worker processes where it has any."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: Options) -> None:
        self.tokenizer, self.options = tokenizer, options

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        return batches(self.tokenizer, self.options, worker.id if worker else 0)


def padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    labels = [targets(tokenizer, row) + [IGNORED] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def loss_of(model: Model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the target tokens; logits are computed for these positions only. For a mixture,
    and the loss that its experts' work be equal.
    """
    wanted = labels[:, 1:] != IGNORED
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden, imbalance = hidden_states(model, ids[:, :-1])
        logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted]) + imbalance


def optimizers(model: Model, inner: str = "layer", slow: str = "$^") -> list[torch.optim.Optimizer]:
    """AdamW, but Muon (https://kellerjordan.github.io/posts/muon) for the matrices inside the layers.

    inner: the expression by which these are known; slow: that of what learns at a fifth of AdamW's rate.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"inner": [], "slow": [], "outer": []}
    for name, value in model.named_parameters():
        is_inner = value.ndim == 2 and re.search(inner, name)
        groups["inner" if is_inner else "slow" if re.search(slow, name) else "outer"].append(value)
    # The rates here are relative: `update` multiplies them by the schedule's.
    outer = [{"params": groups["outer"], "lr": 0.5}, {"params": groups["slow"], "lr": 0.1}]
    both: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            groups["inner"], lr=1.0, weight_decay=0.05, ns_steps=3, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([group for group in outer if group["params"]], weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    for group in (group for stepper in both for group in stepper.param_groups):
        group["initial_lr"] = group["lr"]
    return both


class Schedule(Protocol):
    """What of a trainer's options `rate_at` reads."""

    @property
    def rate(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def hold(self) -> float: ...


def rate_at(progress: float, options: Schedule) -> float:
    """Warm-up, a plateau, then linear decay to zero at progress 1."""
    if progress < options.warmup:
        return options.rate * (progress + 1e-3) / (options.warmup + 1e-3)
    return options.rate * min(1.0, max(0.0, (1 - progress) / (1 - options.hold)))


def step(model: Model, steppers: list[torch.optim.Optimizer], batch: Batch, rate: float) -> float:
    ids, labels = batch
    loss = loss_of(model, ids.to(model.device), labels.to(model.device))
    update(model, steppers, loss, rate)
    return float(loss.detach())


def update(model: Model, steppers: list[torch.optim.Optimizer], loss: torch.Tensor, rate: float) -> None:
    """One step of every optimizer down the loss's gradient, cut to a norm of 1."""
    loss.backward()
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate * group["initial_lr"]
        stepper.step()
        stepper.zero_grad(set_to_none=True)


def train(model: Model, tokenizer: PreTrainedTokenizerFast, options: Options) -> dict[str, float]:
    """Train in place for the given minutes; returns {steps, tokens (without padding), minutes}."""
    steppers, start, seen, recent = optimizers(model), time.monotonic(), 0, 0.0
    next_snapshot = options.snapshot_minutes
    loader = torch.utils.data.DataLoader(Stream(tokenizer, options), None, num_workers=options.workers)
    for index, batch in enumerate(loader):
        minutes = (time.monotonic() - start) / 60
        progress = agreed(minutes / options.minutes)
        if progress >= 1:
            break
        rate = rate_at(progress, options)
        recent = 0.95 * recent + 0.05 * step(model, steppers, batch, rate)
        seen += int((batch[0] != tokenizer.pad_token_id).sum())
        if rank():
            continue
        if index % 50 == 0:
            log(f"step {index}: {minutes:.1f} min, {seen / 1e6:.2f}M tokens, {rate=:.0e}, loss {recent:.4f}")
        if minutes >= next_snapshot:
            next_snapshot += options.snapshot_minutes
            save(model, tokenizer, options.out.with_name(options.out.name + "-snapshot"))
            log(report(evaluate(model, tokenizer, 8)))
    return {"steps": index, "tokens": seen, "minutes": minutes}


@torch.no_grad()
def answers(model: Model, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Greedy continuations of at most 80 tokens, one padded batch."""
    encoded = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(**encoded.to(model.device), max_new_tokens=80, do_sample=False, **ends)
    cut = output[:, encoded["input_ids"].shape[1] :]
    return [text.split("<|im_end|>")[0].replace("<|endoftext|>", "") for text in tokenizer.batch_decode(cut)]


def evaluate(model: Model, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> Shares:
    """Share of exactly right answers to held-out prompts, per task; the wrong ones are printed."""
    model.eval()
    shares = {}
    for task in tasks.TASKS:
        examples = tasks.held_out(task, count, seed)
        outputs = answers(model, tokenizer, [render(tokenizer, example, True) for example in examples])
        wrong = [pair for pair in zip(examples, outputs, strict=True) if not tasks.grade(*pair)]
        for example, output in wrong:
            log(f"  {task}: {example.messages[-1]['content']!r} -> {output!r}, not {example.answer!r}")
        shares[task] = 1 - len(wrong) / len(examples)
    model.train()
    return shares


def report(shares: Shares) -> str:
    overall = sum(shares.values()) / len(shares)
    return f"exact match {overall:.4f} " + json.dumps(
        {task: round(share, 3) for task, share in shares.items()}
    )


def save(model: Model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint as transformers does, with tokenizer and chat template."""
    rounded: Model = type(model)(model.config)
    rounded.to(torch.bfloat16).load_state_dict(model.state_dict())
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    rounded.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Any version of transformers knows this class name, and this field as published mixtures have it.
    _change(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, {})
    _change(out / "config.json", {}, {"num_local_experts": "num_experts"})


def _change(path: Path, values: dict[str, str], names: dict[str, str]) -> None:
    found = {names.get(name, name): value for name, value in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(found | values, indent=2) + "\n")


def options_from_flags() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Options.minutes)
    parser.add_argument("--batch-tokens", type=int, default=Options.batch_tokens)
    parser.add_argument("--rate", type=float, default=Options.rate)
    parser.add_argument("--hold", type=float, default=Options.hold)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--workers", type=int, default=Options.workers)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--model", choices=SHAPES, default=Options.model)
    parser.add_argument("--snapshot-minutes", type=float, default=Options.snapshot_minutes)
    parser.add_argument("--device", default=Options.device)
    return Options(**vars(parser.parse_args()))


def beginning(options: Options) -> tuple[PreTrainedTokenizerFast, Model]:
    """Tokenizer and float32 model to train: those of the `init` checkpoint, or fresh ones."""
    shape = SHAPES[options.model]
    if options.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.init)
        # On a CPU the eager kind of attention is faster than the fused one.
        model = shape.kind.from_pretrained(options.init, dtype=torch.float32, attn_implementation="eager")
        return tokenizer, trainable(model)
    tokenizer = tokenizer_of(shape, options.seed)
    return tokenizer, new_model(shape, tokenizer, options.seed)


def main() -> None:
    options = options_from_flags()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    tokenizer, model = beginning(options)
    model.to(options.device)
    result = train(model, tokenizer, options)
    if rank() == 0:
        log(json.dumps(result))
        finish(model, tokenizer, options)


def finish(model: Model, tokenizer: PreTrainedTokenizerFast, options: Options) -> None:
    """Save the model, and judge it and what was saved."""
    save(model, tokenizer, options.out)
    log("float32:", report(evaluate(model, tokenizer, 50, seed=1)))
    saved = trainable(type(model).from_pretrained(options.out, dtype=torch.float32))
    log("saved bfloat16:", report(evaluate(saved.to(options.device), tokenizer, 50, seed=1)))


if __name__ == "__main__":
    main()
