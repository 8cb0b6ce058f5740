"""Images through the pipeline: the tokens that transformers gives, whichever way the engine takes."""

from __future__ import annotations

import json
import pickle
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmdeploy_jax import GenerationConfig, Pipeline, pipeline
from lmdeploy_jax.engine.core import buckets
from lmdeploy_jax.engine.core.encoder import run_bytes
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.io.frontend import PromptOptions
from lmdeploy_jax.engine.process.remote import _message
from lmdeploy_jax.engine.request import Request, SamplingParams
from lmdeploy_jax.prompt import EncodedPrompt, RopePositions, Span, SpanImage
from lmdeploy_jax.text.prompts import normalise_prompts
from lmdeploy_jax.vision.families import vision_family
from tests.engine.harness import Collector, config, submit, tokens
from tests.patience import PATIENCE, wait_until
from tests.vision.oracle import hf_model, hf_processor, save_checkpoint
from tests.vision.pictures import picture
from tests.vision.pillow import processed

COUNT = 16
GREEDY = GenerationConfig(max_new_tokens=COUNT, ignore_eos=True)
ONE, OTHER = picture(60, 85), picture(31, 40, seed=1)
ASK, MORE = "w5 w6 w7", "w8 w9"
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}w3"
PLACEHOLDER, ROW_BYTES = 100, 64 * 4
BESIDE = {"<img>": 101, "</img>": 102, "[IMG_BREAK]": 103, "[IMG_END]": 104,
          "<|vision_start|>": 105, "<|vision_end|>": 106, "<|video_pad|>": 107, "<start_of_image>": 108,
          "<end_of_image>": 109, "<|image>": 111, "<image|>": 112}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """A checkpoint with a tokenizer of words, whose token 100 stands for a row of an image."""
    save_checkpoint(name, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if "llm_config" in raw:  # the checkpoint that it was made of ties its head
        raw["llm_config"]["tie_word_embeddings"] = True
        path.write_text(json.dumps(raw))
    save_tokenizer(folder, raw)
    return folder


def save_tokenizer(folder: Path, raw: Mapping[str, Any]) -> None:
    """For the checkpoint of a config."""
    family = vision_family(raw)
    assert family is not None
    special = {family.placeholder.token: PLACEHOLDER} | BESIDE
    words = {f"w{i}": i for i in range(PLACEHOLDER)} | special | {"?": 110}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE).save_pretrained(folder)


@torch.no_grad()
def hf_tokens(name: str, folder: Path, ids: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
    """What transformers answers greedily."""
    model = hf_model(name, folder)
    model.generation_config.eos_token_id = None
    inputs = dict(processed(hf_processor(name), list(images), "pt")) if images else {}
    names = ("pixel_values", "image_sizes", "image_grid_thw", "image_position_ids")
    given = {key: inputs[key] for key in names if key in inputs}
    tokens = torch.tensor([list(ids)])
    if "image_grid_thw" in inputs or "image_position_ids" in inputs:
        given["mm_token_type_ids"] = (tokens == PLACEHOLDER).int()
    if name.startswith("gemma3"):
        given["token_type_ids"] = (tokens == PLACEHOLDER).int()
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given, **options)
    return out[0, len(ids) :].tolist()


def encoded(pipe: Pipeline, prompt: Any) -> list[int]:
    """A prompt's tokens as the engine gets them."""
    ((found,), _) = normalise_prompts(prompt, images=True)
    return list(pipe.frontend.encode(found, PromptOptions()).ids)


Open = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("internvl_hf", tmp_path_factory.mktemp("images") / "internvl_hf")


@pytest.fixture
def opened(compile_cache: Path) -> Iterator[Open]:
    pipes = []

    def open_pipe(folder: Path, **changes: object) -> Pipeline:
        pipes.append(pipeline(folder, config(compile_cache, **changes), progress=False))
        return pipes[-1]

    yield open_pipe
    for pipe in pipes:
        pipe.close()


OTHERS = ("llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "gemma4", "gemma4_small", "qwen3_vl_moe", "qwen3_5",
        "qwen3_5_moe", "internvl_moe", "glm4v", "glm4v_moe")  # fmt: skip
FAMILIES = ["internvl_hf", "internvl", "llava_next", "pixtral", "qwen3_vl", "gemma3",
            *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_transformers(name: str, tmp_path: Path, opened: Open) -> None:
    folder = save(name, tmp_path / name)
    pipe = opened(folder)
    prompts = [(ASK, ONE), (MORE, [ONE, OTHER]), ASK]
    answers = pipe(prompts, GREEDY)
    for prompt, images, answer in zip(prompts, ([ONE], [ONE, OTHER], []), answers, strict=True):
        assert answer.token_ids == hf_tokens(name, folder, encoded(pipe, prompt), images)


MANY = [ONE, OTHER, picture(90, 30), picture(50, 50, seed=2)]  # more than a page of tokens


@pytest.fixture(scope="module")
def expected(checkpoint: Path, compile_cache: Path) -> dict[str, list[int]]:
    """What transformers answers to `MANY` and to `ONE` alone."""
    with pipeline(checkpoint, config(compile_cache), progress=False) as pipe:
        ids = {"many": encoded(pipe, (ASK, MANY)), "one": encoded(pipe, (ASK, ONE))}
    assert len(ids["many"]) > 64
    images = {"many": MANY, "one": [ONE]}
    return {key: hf_tokens("internvl_hf", checkpoint, ids[key], images[key]) for key in ids}


def runs(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The views of each run of the encoder from now on."""
    encoder = pipe.frontend.engine._runner._steps._encoder  # type: ignore[attr-defined]
    seen, run = [], encoder._run

    def counted(program: Any, views: list[Any], wanted: list[Any]) -> None:
        seen.append(len(wanted))
        run(program, views, wanted)

    monkeypatch.setattr(encoder, "_run", counted)
    return seen


def test_the_same_image_is_neither_encoded_nor_prefilled_again(
    checkpoint: Path, opened: Open, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = opened(checkpoint)
    seen = runs(pipe, monkeypatch)
    cold = pipe((ASK, MANY), GREEDY)
    assert (cold.token_ids, cold.cached_tokens) == (expected["many"], 0)
    assert seen, "nothing was encoded"
    seen.clear()
    warm = pipe((ASK, MANY), GREEDY)
    assert (warm.token_ids, warm.cached_tokens) == (expected["many"], 64)
    assert pipe((ASK, ONE), GREEDY).token_ids == expected["one"]
    assert seen == [], "an image that is held was encoded again"
    negative = Image.eval(ONE, lambda level: 255 - level)
    other = pipe((ASK, [negative, *MANY[1:]]), GREEDY)
    assert (other.cached_tokens, other.token_ids == expected["many"]) == (0, False)
    several = pipe((ASK, MANY), GenerationConfig(max_new_tokens=COUNT, ignore_eos=True, n=3))
    assert [each.token_ids for each in (several, *several.choices)] == [expected["many"]] * 3
    for piece in pipe.stream_infer((MORE, [negative]), gen_config=GREEDY):
        assert piece.finish_reason is None
        break  # closes the stream, which aborts
    batch = pipe([(ASK, MANY), ASK, (ASK, ONE)] * 2, GREEDY)
    assert [batch[i].token_ids for i in (0, 2, 3, 5)] == [expected["many"], expected["one"]] * 2


def test_an_encoder_sleeps_and_wakes_and_its_memory_is_planned(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA-NeXT has learned rows too, which must come back."""
    pipe = opened(save("llava_next", tmp_path / "llava_next"), enable_prefix_caching=False)
    engine: Any = pipe.frontend.engine
    expected = pipe((ASK, MANY), GREEDY).token_ids
    assert pipe((ASK, MANY), GREEDY).token_ids == expected
    assert (engine.stats.encoder_cache_queries, engine.stats.encoder_cache_hits) == (8, 4)
    for level in (1, 2):
        leaves = engine._runner.state.vision_leaves
        engine.sleep(level)
        assert leaves
        assert all(leaf.is_deleted() for leaf in leaves)
        engine.wake()
        seen = runs(pipe, monkeypatch)
        assert pipe((ASK, MANY), GREEDY).token_ids == expected
        assert seen
    vision, memory, rows = engine._runner.state.vision, engine.memory, engine._runner.state.image_rows
    largest = run_bytes(vision.config, buckets.TILES["cpu"][-1], 4)
    assert memory.images == rows.nbytes + largest
    assert rows.nbytes >= buckets.ENCODER_CACHE_BYTES["cpu"]
    assert "GB of them for images" in str(memory)


@pytest.mark.parametrize("held", [8, *(pytest.param(held, marks=pytest.mark.full) for held in (4, 40))])
def test_chunks_end_within_images_that_do_not_all_fit(
    held: int, checkpoint: Path, opened: Open, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 rows: one view; 8: fewer than one image has; 40: room for some of them."""
    monkeypatch.setitem(buckets.ENCODER_CACHE_BYTES, "cpu", held * ROW_BYTES)
    pipe = opened(checkpoint, max_prefill_token_num=16, max_batch_size=4)
    answers = pipe([(ASK, MANY), (ASK, ONE), (ASK, MANY)], GREEDY)
    assert [answer.token_ids for answer in answers] == [expected[key] for key in ("many", "one", "many")]


def test_a_step_that_is_read_along_waits_for_one_small_run(
    checkpoint: Path, opened: Open, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = opened(checkpoint)
    engine, events = pipe.frontend.engine, runs(pipe, monkeypatch)
    alone = tokens(engine, [range(5)], max_new_tokens=80)
    prompt = pipe.frontend.encode(normalise_prompts((ASK, MANY), images=True)[0][0], PromptOptions())
    images = Collector()
    engine.on_step = lambda count: events.append(0)
    text = Collector(on_first=lambda: submit(engine, prompt, images, max_new_tokens=COUNT) and None)
    submit(engine, range(5), text, max_new_tokens=80)
    assert images.wait()[0].tokens == expected["many"]
    assert text.wait()[0].tokens == alone[0]
    assert sum(events) == sum(len(each.patches) for each in prompt.images)
    assert max(events) == 4
    assert len([size for size in events if size]) > 2
    assert not any(one and other for one, other in pairwise(events)), "two runs before one step"


def test_preempted_images_are_computed_again(checkpoint: Path, opened: Open) -> None:
    page = opened(checkpoint).frontend.engine.memory.page_bytes  # type: ignore[attr-defined]
    pipe = opened(checkpoint, cache_max_entry_count=8 * page, enable_prefix_caching=False)
    prompts = [(ASK, MANY), (MORE, MANY), (ASK, MANY[::-1])]
    long = GenerationConfig(max_new_tokens=90, ignore_eos=True)
    together = [answer.token_ids for answer in pipe(prompts, long)]
    assert pipe.frontend.engine.stats.preemptions > 0
    assert together == [pipe(prompt, long).token_ids for prompt in prompts]


def test_messages_and_what_is_said_of_broken_ones(checkpoint: Path, opened: Open) -> None:
    pipe = opened(checkpoint)

    def message(**part: object) -> list[dict[str, object]]:
        return [{"role": "user", "content": [{"type": "text", "text": ASK}, part]}]

    good = message(type="image_url", image_url={"url": "data:image/png;base64," + encode_png(ONE)})
    assert encoded(pipe, good) == encoded(pipe, (ASK, ONE))
    wrong = [
        (message(type="image_url", image_url={"url": "/no/such.png"}), "content[1]: the file '/no/such.png'"),
        (message(type="image", image=ONE, detail="most"), "content[1]: detail is 'most'"),
        (message(type="image_data"), "content[1]: no image."),
        ((ASK + " <IMG_CONTEXT>", ONE), "2 placeholders <IMG_CONTEXT> for 1 images"),
    ]
    for prompt, said in wrong:
        answer = pipe([prompt], GREEDY)[0]
        assert answer.finish_reason == "error"
        assert said in (answer.error_message or "")


def encode_png(image: Image.Image) -> str:
    held = BytesIO()
    image.save(held, "PNG")
    return b64encode(held.getvalue()).decode()


def test_a_language_model_only_takes_no_images(checkpoint: Path, opened: Open) -> None:
    pipe = opened(checkpoint, language_model_only=True)
    text, refused = pipe([ASK, (ASK, ONE)], GREEDY)
    assert text.token_ids == hf_tokens("internvl_hf", checkpoint, encoded(pipe, ASK), [])
    assert "Images are not supported" in (refused.error_message or "")
    names = {name for name, _ in pipe.frontend.engine._runner._steps._programs}  # type: ignore[attr-defined]
    assert not names & {"encode", "images"}


def test_text_models_have_no_program_more(engine: Engine) -> None:
    names = {name for name, _ in engine._runner._steps._programs}
    assert "ragged" in names
    assert not names & {"encode", "images"}


def test_images_cross_to_the_engines_process() -> None:
    image = SpanImage(np.arange(6, dtype=np.uint8).reshape(1, 2, 3), (1, 2), np.arange(2), np.arange(2), 2)
    rope = RopePositions(np.arange(6).reshape(3, 2), -1)
    prompt = EncodedPrompt([PLACEHOLDER] * 2, (Span(0, 2, b"content"),), b"salt", (image,), rope)
    sent = _message(Request(prompt, SamplingParams(max_new_tokens=1), print))
    got = EncodedPrompt(*pickle.loads(pickle.loads(sent).body).prompt)
    assert (got.ids, got.spans, got.salt) == (prompt.ids, prompt.spans, prompt.salt)
    assert np.array_equal(got.images[0].patches, image.patches)
    assert got.rope is not None
    assert got.rope.offset == -1
    assert np.array_equal(got.rope.positions, rope.positions)


def test_what_is_aborted_while_its_images_are_encoded_gives_everything_back(
    checkpoint: Path, opened: Open, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, one of them with three answers; the images that were encoded stay held, and are right."""
    pipe = opened(checkpoint, max_prefill_token_num=32)
    engine: Any = pipe.frontend.engine
    encoder, entered, let_go = engine._runner._steps._encoder, threading.Event(), threading.Event()
    prepare = encoder.prepare

    def held(step: Any) -> None:
        prepare(step)
        if step.encoder_runs:
            entered.set()
            assert let_go.wait(PATIENCE)

    monkeypatch.setattr(encoder, "prepare", held)
    prompt = pipe.frontend.encode(normalise_prompts((ASK, MANY), images=True)[0][0], PromptOptions())
    collectors = [Collector(n=1), Collector(n=3)]
    requests = [submit(engine, prompt, each, n=len(each.results)) for each in collectors]
    assert entered.wait(PATIENCE)
    for request in requests:
        engine.abort(request.request_id)
    let_go.set()
    assert [one.reason for each in collectors for one in each.wait()] == ["abort"] * 4
    wait_until(lambda: not engine.scheduler.has_work and not engine._flight)
    engine.scheduler.check_integrity()
    images = engine.scheduler.encoder_cache
    rows = sorted([*images._free, *(row for rows in images._held.values() for row in rows.tolist())])
    assert rows == list(range(images.capacity - images._learned))
    assert engine.scheduler.cache.pool.used == 0
    assert pipe((ASK, MANY), GREEDY).token_ids == expected["many"]
