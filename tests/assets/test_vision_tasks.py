"""The tasks of tiny-vision: split, determinism, balance, and images that show what is asked."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from lmdeploy_jax.assets import tasks, vision_tasks
from lmdeploy_jax.assets.vision_tasks import Example, canvas
from lmdeploy_jax.assets.vision_tasks.arrangements import Arrangement, Placed

BLIND = 0.3


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example for task in vision_tasks.TASKS for example in vision_tasks.held_out(task, 8)]


@pytest.mark.parametrize("task", vision_tasks.TASKS)
def test_held_out_scenes_are_many_and_in_no_training_image(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {key for scene, _ in vision_tasks.held_out_scenes(task, 100, seed=1) for key in scene.keys}
    assert len(held) >= 100
    trained = []

    def noted(key: str) -> bool:
        trained.append(key)
        return tasks.is_held_out(key)

    monkeypatch.setattr(vision_tasks, "is_held_out", noted)
    rng = random.Random(0)
    for _ in range(60):
        trained.clear()
        lesson = vision_tasks.training_lesson(rng, (task,))
        drawn = trained[-len(lesson.images) :]  # the scenes before it were rejected
        assert len(drawn) == len(lesson.images)
        assert not held & set(drawn)
        assert not any(map(tasks.is_held_out, drawn))


@pytest.mark.parametrize("task", vision_tasks.TASKS)
def test_a_guess_without_the_image_is_seldom_right(task: str) -> None:
    """The best guess knows the frequent answers to every question, without the words around it."""
    scenes = vision_tasks.held_out_scenes(task, {"compare": 1000, "chart": 3000}.get(task, 500))
    pairs = [(question.text.lower().rstrip("?.! "), question.answer) for _, question in scenes]
    half, answers = len(pairs) // 2, defaultdict(Counter)
    for text, answer in pairs[:half]:
        answers[text][answer] += 1
        answers[""][answer] += 1
    guesses = [answers[text if text in answers else ""].most_common(1)[0][0] for text, _ in pairs[half:]]
    right = sum(guess == answer for guess, (_, answer) in zip(guesses, pairs[half:], strict=True))
    assert right / half < BLIND


def test_the_same_seed_gives_the_same_images(examples: list[Example]) -> None:
    again = [example for task in vision_tasks.TASKS for example in vision_tasks.held_out(task, 8)]
    for one, other in zip(examples, again, strict=True):
        assert one.answer == other.answer
        for left, right in zip(vision_tasks.images_of(one), vision_tasks.images_of(other), strict=True):
            np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_examples_are_messages_that_the_grader_knows(examples: list[Example]) -> None:
    for example in examples:
        images = vision_tasks.images_of(example)
        assert len(images) == (2 if example.task == "compare" else 1)
        assert tasks.grade(example, example.answer)
        assert not tasks.grade(example, example.answer + " indeed")


def test_blanked_images_keep_their_size_and_show_nothing(examples: list[Example]) -> None:
    for example in examples:
        blank = vision_tasks.blanked(example)
        sizes = [image.size for image in vision_tasks.images_of(example)]
        assert [image.size for image in vision_tasks.images_of(blank)] == sizes
        assert all(len(image.getcolors()) == 1 for image in vision_tasks.images_of(blank))
        assert blank.messages[0]["content"][-1] == example.messages[0]["content"][-1]


@pytest.mark.parametrize("place", [0, 4, 5])
def test_shapes_are_drawn_where_and_in_what_colour_the_answer_says(place: int) -> None:
    rng = random.Random(place)
    for shape in canvas.SHAPES:
        for colour, (red, green, blue) in canvas.COLOURS.items():
            (image,) = Arrangement((Placed(shape, colour, place),)).draw(rng)
            far = np.abs(np.asarray(image).astype(int) - (red, green, blue)).max(axis=2)
            rows, columns = np.nonzero(far <= 14)  # as far as a tint goes
            assert len(rows) > 60, (shape, colour)
            assert (rows.mean() * 3 // image.height, columns.mean() * 3 // image.width) == divmod(place, 3)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="juggling"):
        vision_tasks.held_out("juggling", 1)


def test_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_tasks, "MOST_DRAWS", 50)
    with pytest.raises(ValueError, match="fewer than 100 held-out scenes"):
        vision_tasks.held_out_scenes("shape", 100)
