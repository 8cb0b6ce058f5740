"""Images of all sizes, M-RoPE and DeepStack: every way through the engine gives transformers' tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lmdeploy_jax import GenerationConfig, pipeline
from lmdeploy_jax.engine.core import buckets, setup
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.steps_gpu import GpuSteps
from tests.devices import virtual_devices
from tests.engine.harness import config
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
    runs,
    save,
)
from tests.patience import PATIENCE
from tests.vision.pictures import picture

__all__ = ["opened"]
Tokens = dict[str, list[int]]
IMAGES = {"many": MANY, "one": [ONE], "none": []}
LONG = GenerationConfig(max_new_tokens=90, ignore_eos=True)


def asked(key: str) -> tuple[str, list[Image.Image]] | str:
    return (ASK, IMAGES[key]) if IMAGES[key] else ASK


@pytest.fixture(
    scope="module",
    params=["qwen3_vl", *(pytest.param(n, marks=pytest.mark.full) for n in ("qwen2_5_vl", "mistral3"))],
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(family, tmp_path_factory.mktemp("packed") / family)


@pytest.fixture(scope="module")
def expected(family: str, checkpoint: Path, compile_cache: Path) -> Tokens:
    """What transformers answers."""
    with pipeline(checkpoint, config(compile_cache), progress=False) as pipe:
        ids = {key: encoded(pipe, asked(key)) for key in IMAGES}
    assert len(ids["many"]) > 64
    found = {key: hf_tokens(family, checkpoint, ids[key], IMAGES[key]) for key in IMAGES}
    assert len({tuple(answer) for answer in found.values()}) == len(found), "answers alike say nothing"
    return found | {"cached": [(len(ids["many"]) - 1) // 64 * 64]}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = buckets.plan
    monkeypatch.setattr(buckets, "plan", lambda platform, *rest: plan("gpu", *rest))
    monkeypatch.setattr(setup, "steps_for", lambda platform: GpuSteps)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_cached_batched_and_forked_answers(
    family: str, checkpoint: Path, opened: Open, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several decode steps at once."""
    pipe = opened(checkpoint, decode_steps=3)
    seen = runs(pipe, monkeypatch)
    assert pipe(asked("many"), GREEDY).token_ids == expected["many"]
    assert sum(seen) == len(MANY)
    if family != "mistral3":  # whose largest run takes two of these no more
        assert seen[0] > 1, "the images that one step reads share a run"
    seen.clear()
    warm = pipe(asked("many"), GREEDY)
    assert (warm.token_ids, [warm.cached_tokens]) == (expected["many"], expected["cached"])
    keys = ["many", "none", "one", "many"]
    batch = pipe([asked(key) for key in keys], GREEDY)
    assert [answer.token_ids for answer in batch] == [expected[key] for key in keys]
    assert seen == []
    several = pipe(asked("many"), GenerationConfig(max_new_tokens=COUNT, ignore_eos=True, n=3))
    assert [each.token_ids for each in (several, *several.choices)] == [expected["many"]] * 3
    turned = pipe((ASK, [*MANY[:-1], MANY[-1].rotate(90)]), GREEDY)
    assert 0 < turned.cached_tokens <= warm.cached_tokens
    assert sum(seen) == 1, "one image was new"


def test_chunks_end_within_images(
    checkpoint: Path, opened: Open, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the rows of the largest image that the model takes, and so not for all of these."""
    monkeypatch.setitem(buckets.ENCODER_CACHE_BYTES, "cpu", 1)
    pipe = opened(checkpoint, max_prefill_token_num=16, max_batch_size=4)
    keys = ["many", "one", "none", "many"]
    answers = pipe([asked(key) for key in keys], GREEDY)
    assert [answer.token_ids for answer in answers] == [expected[key] for key in keys]


@pytest.mark.full
def test_preempted_images_are_computed_again(checkpoint: Path, opened: Open) -> None:
    """Tokens that were drawn before go on from where the images left the positions."""
    page = opened(checkpoint).frontend.engine.memory.page_bytes  # type: ignore[attr-defined]
    pipe = opened(checkpoint, cache_max_entry_count=8 * page, enable_prefix_caching=False)
    prompts = [(ASK, MANY), (MORE, MANY), (ASK, MANY[::-1])]
    together = [answer.token_ids for answer in pipe(prompts, LONG)]
    assert pipe.frontend.engine.stats.preemptions > 0
    assert together == [pipe(prompt, LONG).token_ids for prompt in prompts]


def test_odd_sizes(family: str, checkpoint: Path, opened: Open) -> None:
    """What transformers takes, we take; its refusal of thin images is ours."""
    pipe = opened(checkpoint)
    one = () if family == "mistral3" else ((1, 1),)  # of a single row transformers loses an axis there
    for height, width in (*one, (37, 53), (7, 90)):
        image = picture(height, width)
        ids = encoded(pipe, (ASK, image))
        assert pipe((ASK, image), GREEDY).token_ids == hf_tokens(family, checkpoint, ids, [image])
    if family != "mistral3":
        refused = pipe((ASK, picture(1, 3000)), GREEDY)
        assert "3000 pixels wide and 1 high; its longer edge may be at most 200 times" in str(
            refused.error_message
        )
        large = {"type": "image", "image": picture(300, 300), "max_pixels": 2**20}
        refused = pipe([{"role": "user", "content": [large]}], GREEDY)
        assert "of which this model takes" in str(refused.error_message)


SHARDED = """
import json, sys
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
from lmdeploy_jax import pipeline
from tests.engine.harness import config
from tests.engine.test_packed_images import GREEDY, asked
folder, cache, keys, tp = json.loads(sys.argv[1])
with pipeline(folder, config(cache, tp=tp, max_batch_size=4), progress=False) as pipe:
    answers = pipe([asked(key) for key in keys], GREEDY)
print("tokens", json.dumps([answer.token_ids for answer in answers]))
"""


@pytest.mark.full
@pytest.mark.parametrize("tp", [4, 2])
def test_tensor_parallel_devices_give_the_same_tokens(
    tp: int, checkpoint: Path, compile_cache: Path, expected: Tokens
) -> None:
    keys = ["many", "one"]
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps([str(checkpoint), str(compile_cache), keys, tp])],
        env=virtual_devices(4),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert lines == [[expected[key] for key in keys]], done.stderr[-2000:]


@pytest.mark.full
def test_the_interpreted_kernels_give_the_same_tokens(
    checkpoint: Path, opened: Open, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "choose_backend", lambda *given: "pallas_interpret")
    pipe = opened(checkpoint, max_prefill_token_num=64, max_batch_size=2)
    assert pipe(asked("one"), GREEDY).token_ids == expected["one"]


@pytest.mark.full
@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_is_compiled_for_an_image(checkpoint: Path, opened: Open, expected: Tokens) -> None:
    pipe = opened(checkpoint, eager_mode=False, max_batch_size=2, max_prefill_token_num=128)
    counter = CompileCounter()
    assert pipe(asked("many"), GREEDY).token_ids == expected["many"]
    pipe([(ASK, picture(8 * size, 9 * size)) for size in range(1, 9)], GREEDY)
    assert counter.count == 0
