"""tiny-vision as it is shipped: what its card and the README say of it, through the pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

import lmdeploy_jax
from lmdeploy_jax import Pipeline, pipeline
from lmdeploy_jax.assets import EXAMPLE_IMAGE, TINY_VISION, vision_tasks
from lmdeploy_jax.bench.accuracy import accuracy
from lmdeploy_jax.vl import encode_image_base64, load_image
from tests.engine.harness import config
from tests.server.live import serving

README = Path(lmdeploy_jax.__file__).parent.parent / "README.md"
COUNT = 6  # examples a task; the card's figures are of 50
MARGIN = 0.06
BLIND = 0.3


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with pipeline("tiny-vision", config(tmp_path_factory.mktemp("xla")), progress=False) as found:
        yield found


def stated() -> float:
    """The mean that the model card states, as a share."""
    found = re.search(r"Mean over the tasks: ([0-9.]+) %", (TINY_VISION / "README.md").read_text())
    assert found, "the model card states no figure"
    return float(found[1]) / 100


def test_the_readme_shows_what_it_says(pipe: Pipeline) -> None:
    call = r'pipe\(\("([^"]+)", load_image\(EXAMPLE_IMAGE\)\)\)\.text\)\n +# (.+)\n'
    shown = re.search(call, README.read_text())
    assert shown
    assert pipe((shown[1], load_image(EXAMPLE_IMAGE))).text == shown[2]


def test_clients_of_three_protocols_get_the_answer(pipe: Pipeline) -> None:
    """The image crosses HTTP as a data URL, in each protocol's own part."""
    encoded, where = encode_image_base64(load_image(EXAMPLE_IMAGE)), "Where is the star?"
    url = f"data:image/png;base64,{encoded}"
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    with serving(pipe.frontend) as live:
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        claude = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
        chat = client.chat.completions.create(model="tiny-chat", messages=asked(
            {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": where}
        ))  # fmt: skip
        response = client.responses.create(model="tiny-chat", input=asked(
            {"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": where}
        ))  # fmt: skip
        message = claude.messages.create(model="tiny-chat", max_tokens=8, messages=asked(
            {"type": "image", "source": source}, {"type": "text", "text": where}
        ))  # fmt: skip
    assert chat.choices[0].message.content == response.output_text == message.content[0].text == "right"


def asked(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": list(parts)}]


def test_it_is_as_good_as_its_card_says(pipe: Pipeline) -> None:
    shares = accuracy(pipe, COUNT, tasks=vision_tasks)
    assert sum(shares.values()) / len(shares) > stated() - MARGIN, json.dumps(shares)


def test_a_blind_guess_is_seldom_right(pipe: Pipeline) -> None:
    shares = accuracy(pipe, COUNT, tasks=vision_tasks, change=vision_tasks.blanked)
    assert sum(shares.values()) / len(shares) < BLIND, json.dumps(shares)


@pytest.mark.full
def test_every_task_is_answered(pipe: Pipeline) -> None:
    shares = accuracy(pipe, 100, seed=2, tasks=vision_tasks)
    assert min(shares.values()) >= 0.9, json.dumps(shares)
    assert sum(shares.values()) / len(shares) >= 0.95, json.dumps(shares)
    blind = accuracy(pipe, 100, seed=2, tasks=vision_tasks, change=vision_tasks.blanked)
    assert max(blind.values()) < BLIND, json.dumps(blind)
