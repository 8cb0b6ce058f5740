"""Trains tiny-vision: `python -m lmdeploy_jax.assets.train_vision --out DIR --minutes 6 --workers 14`.

Needs torch and transformers; made for one GPU, runs on a CPU too. The learning rate follows the clock, so a
run of any length ends with a decayed rate. Worker processes draw all images while the model learns: none
comes twice but by chance. DIR holds the best checkpoint so far, by held-out examples, in the layout of
published InternVL checkpoints. At its end the model answers other held-out examples, with their images and
blind, with even grey in their place.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from . import vision_tasks
from .tasks import grade
from .tokenizer import train_vision_tokenizer
from .train import IGNORED, Shares, log, optimizers, rate_at, report, targets, update
from .train_vision_model import MEAN, STD, Model, Size, load, new_model, save
from .vision_tasks import Example, Lesson

MOST_TOKENS = 48  # more than any right answer has
SEEN = 20  # held-out examples a task by which checkpoints are compared
JUDGED = 50  # others, by which the last one is judged


@dataclass(frozen=True)
class Options:
    """`minutes` of training, `batch` lessons a step, `rate` the peak learning rate.

    `warmup` and `hold` are the shares of the time after which the rate has risen, and begins to fall;
    `workers` the processes that draw (0: the training process itself); `tasks` what is trained and judged;
    `snapshot_minutes` the time between two judgements; `init` a checkpoint of this script to go on from, with
    its tokenizer.
    """

    out: Path
    minutes: float = 6.0
    batch: int = 256
    rate: float = 3e-3
    warmup: float = 0.03
    hold: float = 0.4
    seed: int = 0
    workers: int = 0
    snapshot_minutes: float = 2.0
    tasks: tuple[str, ...] = vision_tasks.TASKS
    size: Size = field(default_factory=Size)
    init: Path | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


class Batch(NamedTuple):
    """ids, labels: int64 [B, T]; pixels: uint8 [images, side, side, 3], of all rows in order."""

    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor


def render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], size: Size, prompt: bool
) -> str:
    """The text of a conversation with every image's tokens; with `prompt`, ready for the next answer."""
    plain = [message | {"content": _parts(message["content"])} for message in messages]
    text = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt))
    return text.replace("<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * size.tokens}</img>")


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if "image_data" in part else part for part in content]


def levels(image: Image.Image, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: stretched along one axis and then the other, as served checkpoints have it."""
    wide = image.resize((side, image.height), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((side, side), Image.Resampling.BICUBIC))


def conversation(lesson: Lesson) -> list[dict[str, Any]]:
    """The images with the first question, the others behind its answer."""
    first, *others = lesson.questions
    asked = [vision_tasks.message(lesson.images, first.text)]
    asked += [{"role": "user", "content": question.text} for question in others]
    pairs = zip(asked, lesson.questions, strict=True)
    return [
        message
        for ask, question in pairs
        for message in (ask, {"role": "assistant", "content": question.answer})
    ]


def batches(tokenizer: PreTrainedTokenizerFast, options: Options, worker: int = 0) -> Iterator[Batch]:
    """Endless batches of fresh lessons."""
    rng = random.Random(f"{options.seed}/{worker}")
    while True:
        lessons = [vision_tasks.training_lesson(rng, options.tasks) for _ in range(options.batch)]
        texts = [render(tokenizer, conversation(lesson), options.size, False) for lesson in lessons]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        images = [levels(image, options.size.image) for lesson in lessons for image in lesson.images]
        yield Batch(*padded(tokenizer, rows), torch.from_numpy(np.stack(images)))


def padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, both [B, T] int64: only what the assistant says is learned."""
    width = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    labels = [targets(tokenizer, row) + [IGNORED] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


class Stream(torch.utils.data.IterableDataset[Batch]):
    """`batches`, made in the DataLoader's worker processes where it has any."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, options: Options) -> None:
        self.tokenizer, self.options = tokenizer, options

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        if worker:
            torch.set_num_threads(1)
        return batches(self.tokenizer, self.options, worker.id if worker else 0)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """float32 [images, 3, side, side] of levels, by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def loss_of(model: Model, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the target tokens; logits are computed for these positions only.

    Rows are padded on the right, where no earlier token sees them: no mask is needed.
    """
    wanted = batch.labels[:, 1:] != IGNORED
    kind = batch.ids.device.type  # CPUs are slower at bfloat16, not faster
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
        pixels = normalised(batch.pixels)
        output = model.model(input_ids=batch.ids[:, :-1], pixel_values=pixels, use_cache=False)
        logits = model.lm_head(output.last_hidden_state[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])


def loader(tokenizer: PreTrainedTokenizerFast, options: Options) -> Iterator[Batch]:
    """Endless batches on the training device, drawn by the worker processes while the model learns."""
    pinned = options.device.startswith("cuda")
    drawn = torch.utils.data.DataLoader(
        Stream(tokenizer, options), None, num_workers=options.workers, pin_memory=pinned
    )
    for batch in drawn:
        yield Batch(*(value.to(options.device, non_blocking=True) for value in batch))


def vision_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """With AdamW's full rate on what every patch goes through (its inputs are many and much alike), all
    patches soon look the same, and the answers stay those of a blind guess.
    """
    return optimizers(model, inner="layer|projector", slow="patch_embeddings")


def train(model: Model, tokenizer: PreTrainedTokenizerFast, options: Options) -> dict[str, float]:
    """Train in place for the given minutes; returns {steps, lessons, minutes, waited, best}.

    The best of what was judged on the way lies in `options.out`. waited: the minutes in which no image was
    ready.
    """
    drawn, steppers = loader(tokenizer, options), vision_optimizers(model)
    batch, waited, best, next_look, steps = next(drawn), 0.0, -1.0, options.snapshot_minutes, 0
    start = time.monotonic()
    model.train()
    while (minutes := (time.monotonic() - start) / 60) < options.minutes:
        loss = loss_of(model, batch)
        update(model, steppers, loss, rate_at(minutes / options.minutes, options))
        if steps % 50 == 0:
            log(f"step {steps}: {minutes:.2f} min, {waited:.2f} waited, loss {loss.item():.4f}")
        if minutes >= next_look:
            next_look += options.snapshot_minutes
            best = keep_the_best(model, tokenizer, options, best)
        asked, steps = time.monotonic(), steps + 1
        batch = next(drawn)
        waited += (time.monotonic() - asked) / 60
    best = keep_the_best(model, tokenizer, options, best)
    counts = {"steps": steps, "lessons": steps * options.batch}
    return counts | {"minutes": minutes, "waited": waited, "best": best}


def keep_the_best(model: Model, tokenizer: PreTrainedTokenizerFast, options: Options, best: float) -> float:
    """Judge the model, save it if it is the best so far; returns the best mean over the tasks."""
    shares = evaluate(model, tokenizer, options, SEEN)
    log(report(shares))
    mean = sum(shares.values()) / len(shares)
    if mean >= best:
        save(model, tokenizer, options.out)
    return max(mean, best)


@torch.no_grad()
def answers(
    model: Model, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], size: Size
) -> list[str]:
    """Greedy answers, one padded batch."""
    prompts = [render(tokenizer, example.messages, size, True) for example in examples]
    encoded = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    images = [levels(image, size.image) for example in examples for image in vision_tasks.images_of(example)]
    pixels = normalised(torch.from_numpy(np.stack(images)).to(model.device))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(
        input_ids=encoded["input_ids"].to(model.device), pixel_values=pixels, do_sample=False,
        attention_mask=encoded["attention_mask"].to(model.device), max_new_tokens=MOST_TOKENS, **ends,
    )  # fmt: skip
    cut = output[:, encoded["input_ids"].shape[1] :]
    return [text.split("<|im_end|>")[0].replace("<|endoftext|>", "") for text in tokenizer.batch_decode(cut)]


def evaluate(
    model: Model, tokenizer: PreTrainedTokenizerFast, options: Options, count: int, seed: int = 0,
    blind: bool = False,
) -> Shares:  # fmt: skip
    """Share of exactly right answers to held-out examples, per task; three wrong ones of each are printed.

    blind: every image is blanked, and no wrong answer is worth a line.
    """
    model.eval()
    shares = {}
    for task in options.tasks:
        examples = vision_tasks.held_out(task, count, seed)
        examples = [vision_tasks.blanked(example) for example in examples] if blind else examples
        outputs = answers(model, tokenizer, examples, options.size)
        wrong = [pair for pair in zip(examples, outputs, strict=True) if not grade(*pair)]
        for example, output in () if blind else wrong[:3]:
            asked = example.messages[0]["content"][-1]["text"]
            log(f"  {task}: {asked!r} -> {output!r}, not {example.answer!r}")
        shares[task] = 1 - len(wrong) / len(examples)
    model.train()
    return shares


def options_from_flags() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("minutes", "rate", "hold", "snapshot_minutes"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=getattr(Options, name))
    for name in ("batch", "seed", "workers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Options, name))
    for one in fields(Size):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=int, default=one.default)
    parser.add_argument("--tasks", nargs="+", choices=vision_tasks.TASKS, default=vision_tasks.TASKS)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--device", default=Options.device)
    given = vars(parser.parse_args())
    size = Size(**{one.name: given.pop(one.name) for one in fields(Size)})
    return Options(**given | {"tasks": tuple(given["tasks"]), "size": size})


def beginning(options: Options) -> tuple[PreTrainedTokenizerFast, Model]:
    """Tokenizer and float32 model to train: those of the `init` checkpoint, or fresh ones."""
    if options.init is None:
        tokenizer = train_vision_tokenizer(options.seed)
        return tokenizer, new_model(tokenizer, options.size, options.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.init)
    model = new_model(tokenizer, options.size, options.seed)
    load(model, options.init)
    return tokenizer, model


def main() -> None:
    options = options_from_flags()
    tokenizer, model = beginning(options)
    log(f"{sum(value.numel() for value in model.parameters()) / 1e6:.2f}M parameters on {options.device}")
    model.to(options.device)
    log(json.dumps(train(model, tokenizer, options)))
    log("judged:", report(evaluate(model, tokenizer, options, JUDGED, seed=1)))
    log("blind:", report(evaluate(model, tokenizer, options, JUDGED, seed=1, blind=True)))


if __name__ == "__main__":
    main()
