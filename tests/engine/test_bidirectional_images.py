"""Images whose tokens attend to each other both ways (Gemma 3): every way through the engine gives the tokens
of transformers. And tensor parallelism, for images of other kinds too.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_jax import GenerationConfig, pipeline
from lmdeploy_jax.engine.core import setup
from lmdeploy_jax.engine.io.frontend import PromptOptions
from lmdeploy_jax.text.prompts import normalise_prompts
from tests.devices import virtual_devices
from tests.engine.harness import Collector, config, submit, tokens
from tests.engine.test_images import (
    ASK,
    COUNT,
    GREEDY,
    MANY,
    MORE,
    ONE,
    Open,
    encoded,
    hf_tokens,
    opened,
    save,
)
from tests.patience import PATIENCE
from tests.vision.pictures import picture

__all__ = ["opened"]
Tokens = dict[str, list[int]]
ASKED = {"many": (ASK, MANY), "one": (MORE, [ONE])}
VIEW = 16  # tokens of an image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gemma3", tmp_path_factory.mktemp("bidirectional") / "gemma3")


@pytest.fixture(scope="module")
def expected(checkpoint: Path, compile_cache: Path) -> Tokens:
    return answers_of_transformers("gemma3", checkpoint, compile_cache)


def answers_of_transformers(name: str, checkpoint: Path, compile_cache: Path) -> Tokens:
    with pipeline(checkpoint, config(compile_cache), progress=False) as pipe:
        ids = {key: encoded(pipe, prompt) for key, prompt in ASKED.items()}
    return {key: hf_tokens(name, checkpoint, ids[key], ASKED[key][1]) for key in ASKED}


def test_cached_batched_and_forked_answers(checkpoint: Path, opened: Open, expected: Tokens) -> None:
    """The cached prefix ends within an image: its keys are those that it had beside the whole image."""
    pipe = opened(checkpoint)
    prompt = pipe.frontend.encode(normalise_prompts(ASKED["many"], images=True)[0][0], PromptOptions())
    assert any(span.start < 64 < span.stop - 1 for span in prompt.spans)
    batch = pipe([ASKED["many"], ASKED["one"], ASK, ASKED["many"]], GREEDY)
    assert [batch[i].token_ids for i in (0, 1, 3)] == [expected[key] for key in ("many", "one", "many")]
    warm = pipe(ASKED["many"], GREEDY)
    assert (warm.token_ids, warm.cached_tokens) == (expected["many"], 64)
    several = pipe(ASKED["many"], GenerationConfig(max_new_tokens=COUNT, ignore_eos=True, n=3))
    assert [each.token_ids for each in (several, *several.choices)] == [expected["many"]] * 3


@pytest.mark.full
def test_steps_are_made_large_enough_for_an_image(
    checkpoint: Path, opened: Open, expected: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        pipe = opened(checkpoint, max_prefill_token_num=8, max_batch_size=4)
    assert f"max_prefill_token_num is {VIEW + 4} instead of 8" in caplog.text
    engine, text, images = pipe.frontend.engine, Collector(), Collector()
    alone = tokens(engine, [range(5)], max_new_tokens=80)
    prompt = pipe.frontend.encode(normalise_prompts(ASKED["many"], images=True)[0][0], PromptOptions())
    text = Collector(on_first=lambda: submit(engine, prompt, images, max_new_tokens=COUNT) and None)
    submit(engine, range(5), text, max_new_tokens=80)
    assert images.wait()[0].tokens == expected["many"]
    assert text.wait()[0].tokens == alone[0]


@pytest.mark.full
def test_preempted_images_are_computed_again(checkpoint: Path, opened: Open) -> None:
    page = opened(checkpoint).frontend.engine.memory.page_bytes  # type: ignore[attr-defined]
    pipe = opened(checkpoint, cache_max_entry_count=18 * page)
    prompts = [(ASK, MANY), (MORE, MANY), (ASK, MANY[::-1])]
    long = GenerationConfig(max_new_tokens=90, ignore_eos=True)
    together = [answer.token_ids for answer in pipe(prompts, long)]
    assert pipe.frontend.engine.stats.preemptions > 0
    assert together == [pipe(prompt, long).token_ids for prompt in prompts]


def test_crops_of_long_images(tmp_path: Path, opened: Open) -> None:
    """Each view is a block of its own, with words between them."""
    folder = save("gemma3_crops", tmp_path / "gemma3_crops")
    pipe = opened(folder)
    for images in ([picture(40, 100)], [picture(90, 20), ONE]):
        ids = encoded(pipe, (ASK, images))
        assert ids.count(100) > VIEW * len(images)
        assert pipe((ASK, images), GREEDY).token_ids == hf_tokens("gemma3_crops", folder, ids, images)


@pytest.mark.full
def test_steps_hold_the_largest_image_of_any_size(tmp_path: Path, opened: Open) -> None:
    """And only layers with a window see both ways (Gemma 4)."""
    folder = save("gemma4", tmp_path / "gemma4")
    pipe = opened(folder, max_prefill_token_num=8, max_batch_size=4)
    assert pipe(ASKED["one"], GREEDY).token_ids == hf_tokens(
        "gemma4", folder, encoded(pipe, ASKED["one"]), [ONE]
    )


@pytest.mark.full
def test_the_interpreted_kernels_give_the_same_tokens(
    checkpoint: Path, opened: Open, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "choose_backend", lambda *given: "pallas_interpret")
    pipe = opened(checkpoint, max_prefill_token_num=64, max_batch_size=2)
    assert pipe(ASKED["one"], GREEDY).token_ids == expected["one"]


SHARDED = """
import json, sys
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
from lmdeploy_jax import pipeline
from tests.engine.harness import config
from tests.engine.test_bidirectional_images import GREEDY, ASKED
folder, cache, tps = json.loads(sys.argv[1])
for tp in tps:
    with pipeline(folder, config(cache, tp=tp, max_batch_size=4), progress=False) as pipe:
        answers = pipe(list(ASKED.values()), GREEDY)
    print("tokens", json.dumps([answer.token_ids for answer in answers]))
"""


@pytest.mark.full
@pytest.mark.parametrize("name", ["gemma3", "internvl_hf"])
def test_tensor_parallel_devices_give_the_same_tokens(
    name: str, tmp_path: Path, compile_cache: Path, request: pytest.FixtureRequest
) -> None:
    if name == "gemma3":
        folder, expected = request.getfixturevalue("checkpoint"), request.getfixturevalue("expected")
    else:
        folder = save(name, tmp_path / name)
        expected = answers_of_transformers(name, folder, compile_cache)
    tps = [2] if name == "gemma3" else [2, 4]
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps([str(folder), str(compile_cache), tps])],
        env=virtual_devices(4),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert lines == [[expected[key] for key in ASKED]] * len(tps), done.stderr[-2000:]
