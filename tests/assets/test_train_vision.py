"""tiny-vision's trainer learns from images; what it writes answers through the pipeline as in training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lmdeploy_jax import GenerationConfig, Pipeline, pipeline
from lmdeploy_jax.assets import train_vision, vision_tasks
from lmdeploy_jax.assets.tasks import Example
from lmdeploy_jax.assets.tokenizer import train_vision_tokenizer
from lmdeploy_jax.assets.train import update
from lmdeploy_jax.assets.train_vision import Batch, Options, answers, batches, levels, padded, render
from lmdeploy_jax.assets.train_vision_model import Size, new_model, save
from lmdeploy_jax.assets.vision_tasks.arrangements import Arrangement, Placed
from lmdeploy_jax.assets.vision_tasks.scenes import Question
from lmdeploy_jax.bench.accuracy import accuracy
from lmdeploy_jax.converters.config import read_config
from tests.engine.harness import config

SMALL = Size(image=56, patch=14, tower_width=64, tower_layers=1, width=64, layers=1)
STEPS = 80


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_vision_tokenizer(0)


@pytest.fixture(scope="module")
def lessons() -> list[vision_tasks.Lesson]:
    """One question, answered by the image alone; and two images."""
    rng, found = random.Random(0), []
    for shape, answer in (("circle", "circle"), ("star", "star"), ("square", "square"), ("cross", "cross")):
        (image,) = Arrangement((Placed(shape, "blue", 4),)).draw(rng)
        found.append(vision_tasks.Lesson((image,), (Question("What shape is this?", answer),)))
    circle, star = found[0].images[0], found[1].images[0]
    which = Question("What is in the first image?", "circle"), Question("What is in the first image?", "star")
    found.append(vision_tasks.Lesson((circle, star), which[:1]))
    found.append(vision_tasks.Lesson((star, circle), which[1:]))
    return found


@pytest.fixture(scope="module")
def examples(lessons: list[vision_tasks.Lesson]) -> list[Example]:
    return [
        Example(
            "shape" if len(lesson.images) == 1 else "compare",
            (vision_tasks.message(lesson.images, one.text),),
            one.answer,
        )
        for lesson in lessons
        for one in lesson.questions
    ]


@pytest.fixture(scope="module")
def batch(tokenizer: Any, lessons: list[vision_tasks.Lesson]) -> Batch:
    texts = [render(tokenizer, train_vision.conversation(lesson), SMALL, False) for lesson in lessons]
    images = [levels(image, SMALL.image) for lesson in lessons for image in lesson.images]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return Batch(*padded(tokenizer, rows), torch.from_numpy(np.stack(images)))


@pytest.fixture(scope="module")
def trained(tokenizer: Any, batch: Batch) -> tuple[Any, list[float]]:
    """A model that was shown the same lessons again and again, and its losses."""
    model, losses = new_model(tokenizer, SMALL, seed=0), []
    steppers = train_vision.vision_optimizers(model)
    for _ in range(STEPS):
        loss = train_vision.loss_of(model, batch)
        update(model, steppers, loss, 5e-3)
        losses.append(loss.item())
    rounded = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    model.load_state_dict(rounded)  # as it is saved
    return model.eval(), losses


@pytest.fixture(scope="module")
def checkpoint(trained: tuple[Any, list[float]], tokenizer: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny-vision")
    save(trained[0], tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint: Path, tmp_path_factory: Any) -> Iterator[Pipeline]:
    with pipeline(checkpoint, config(tmp_path_factory.mktemp("xla")), progress=False) as found:
        yield found


def test_it_learns_what_only_the_image_says(
    trained: tuple[Any, list[float]], tokenizer: Any, examples: list[Example]
) -> None:
    model, losses = trained
    assert losses[-1] < 0.1 < 3 < losses[0]
    assert answers(model, tokenizer, examples, SMALL) == [example.answer for example in examples]


def test_the_pipeline_answers_as_the_trainer_does(
    pipe: Pipeline, trained: tuple[Any, list[float]], tokenizer: Any, examples: list[Example]
) -> None:
    unseen = [
        example for task in ("describe", "word", "compare") for example in vision_tasks.held_out(task, 2)
    ]
    asked = [*examples, *unseen]
    options = GenerationConfig(max_new_tokens=train_vision.MOST_TOKENS)
    found = pipe.infer([list(example.messages) for example in asked], options)
    assert [one.text for one in found] == answers(trained[0], tokenizer, asked, SMALL)


def test_the_image_may_stand_behind_the_question(pipe: Pipeline, examples: list[Example]) -> None:
    image = vision_tasks.images_of(examples[1])[0]
    assert pipe(("What shape is this?", image)).text == pipe((image, "What shape is this?")).text == "star"


def test_accuracy_is_measured_through_the_pipeline(
    pipe: Pipeline, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {"shape": examples[:4], "compare": examples[4:]}
    monkeypatch.setattr(vision_tasks, "TASKS", tuple(trained))
    monkeypatch.setattr(vision_tasks, "held_out", lambda task, count, seed: trained[task][:count])
    assert accuracy(pipe, 4, tasks=vision_tasks) == {"shape": 1.0, "compare": 1.0}
    blind = accuracy(pipe, 4, tasks=vision_tasks, change=vision_tasks.blanked)
    assert max(blind.values()) <= 0.5  # one question a task, whose answer was different each time


def test_prompts_have_the_tokens_of_training(pipe: Pipeline, tokenizer: Any, examples: list[Example]) -> None:
    options = GenerationConfig(max_new_tokens=1)
    for example in examples[-2:]:
        (message,) = example.messages
        rows = tokenizer.encode(render(tokenizer, [message], SMALL, True), add_special_tokens=False)
        for parts in (message["content"], message["content"][::-1]):
            asked = [[message | {"content": parts}]]
            assert pipe.infer(asked, options)[0].input_token_len == len(rows)


@pytest.mark.parametrize("size", [(300, 200), (40, 57), (1, 90)])
def test_pixels_are_those_of_the_served_checkpoint(pipe: Pipeline, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    processor = pipe.frontend._images._config.processor  # type: ignore[union-attr]
    theirs = processor.rule.views(image)
    assert len(theirs) == 1
    np.testing.assert_array_equal(theirs[0], levels(image, SMALL.image))


def test_the_checkpoint_is_in_the_published_layout(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    assert raw["architectures"] == ["InternVLChatModel"]
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        names = set(file.keys())
    tower = "vision_model.encoder.layers.0."
    assert {tower + "attn.qkv.weight", tower + "ls1", "mlp1.0.weight", "mlp1.3.bias"} <= names
    assert {name.split(".")[0] for name in names} == {"vision_model", "mlp1", "language_model"}
    assert read_config(checkpoint).layers[0] is not None


def test_training_goes_on_from_what_was_saved(checkpoint: Path, trained: tuple[Any, list[float]]) -> None:
    options = Options(checkpoint, size=SMALL, init=checkpoint, seed=1)
    tokenizer, model = train_vision.beginning(options)
    assert tokenizer.get_vocab()["<IMG_CONTEXT>"] == model.config.image_token_id
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_is_shipped_is_at_most_ten_megabytes(tokenizer: Any, tmp_path: Path) -> None:
    save(new_model(tokenizer, Size(), seed=0), tokenizer, tmp_path)
    assert 5_000_000 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000_000


def test_letters_and_digits_of_signs_are_tokens_of_their_own(tokenizer: Any) -> None:
    for task in ("word", "number"):
        for _, question in vision_tasks.held_out_scenes(task, 50):
            assert tokenizer.tokenize(question.answer) == list(question.answer)


def test_batches_are_the_same_for_a_seed_and_differ_by_worker(tokenizer: Any, tmp_path: Path) -> None:
    options = Options(tmp_path, batch=3, size=SMALL)
    first, again, other = (next(batches(tokenizer, options, worker)) for worker in (0, 0, 1))
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert not torch.equal(first.pixels[0], other.pixels[0])


def test_only_answers_are_learned(tokenizer: Any, batch: Batch, examples: list[Example]) -> None:
    for ids, labels, example in zip(batch.ids, batch.labels, examples, strict=True):
        wanted = labels[labels != train_vision.IGNORED]
        assert tokenizer.decode(wanted) == example.answer + "<|im_end|>"
        assert (ids == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum() in (4, 8)


def test_a_run_saves_the_best_and_judges_it(tokenizer: Any, tmp_path: Path) -> None:
    model = new_model(tokenizer, SMALL, seed=0)
    options = Options(tmp_path / "out", minutes=0.02, batch=4, size=SMALL, tasks=("shape",), device="cpu")
    result = train_vision.train(model, tokenizer, options)
    assert result["steps"] >= 1
    assert 0 <= result["best"] <= 1
    assert (tmp_path / "out" / "model.safetensors").exists()
