"""Images through the pipeline: the tokens that transformers gives, whichever way the engine takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmdeploy_jax import GenerationConfig, Pipeline, pipeline
from lmdeploy_jax.vision.families import VISION_FAMILIES
from tests.engine.harness import config
from tests.vision.oracle import hf_model, hf_processor, save_checkpoint
from tests.vision.pictures import picture
from tests.vision.pillow import processed

COUNT = 16
GREEDY = GenerationConfig(max_new_tokens=COUNT, ignore_eos=True)
ONE, OTHER = picture(60, 85), picture(31, 40, seed=1)
ASK, MORE = "w5 w6 w7", "w8 w9"
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}w3"
PLACEHOLDER = 100


def save(name: str, folder: Path) -> Path:
    """A checkpoint with a tokenizer of words, whose token 100 stands for a row of an image."""
    save_checkpoint(name, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if "llm_config" in raw:  # the checkpoint that it was made of ties its head
        raw["llm_config"]["tie_word_embeddings"] = True
        path.write_text(json.dumps(raw))
    token = VISION_FAMILIES[raw["architectures"][0]].placeholder.token
    special = {token: PLACEHOLDER, "<img>": 101, "</img>": 102}
    words = {f"w{i}": i for i in range(PLACEHOLDER)} | special | {"?": 103}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@torch.no_grad()
def hf_tokens(name: str, folder: Path, ids: Sequence[int], images: Sequence[Image.Image]) -> list[int]:
    """What transformers answers greedily."""
    model = hf_model(name, folder)
    model.generation_config.eos_token_id = None
    inputs = dict(processed(hf_processor(name), list(images), "pt")) if images else {}
    given = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    tokens = torch.tensor([list(ids)])
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given, **options)
    return out[0, len(ids) :].tolist()


def encoded(pipe: Pipeline, prompt: Any) -> list[int]:
    """A prompt's tokens as the engine gets them."""
    from lmdeploy_jax.engine.io.frontend import PromptOptions
    from lmdeploy_jax.text.prompts import normalise_prompts

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


@pytest.mark.parametrize("name", ["internvl_hf", "internvl", "llava", "llava_next"])
def test_answers_equal_transformers(name: str, tmp_path: Path, opened: Open) -> None:
    folder = save(name, tmp_path / name)
    pipe = opened(folder)
    prompts = [(ASK, ONE), (MORE, [ONE, OTHER]), ASK]
    answers = pipe(prompts, GREEDY)
    for prompt, images, answer in zip(prompts, ([ONE], [ONE, OTHER], []), answers, strict=True):
        assert answer.token_ids == hf_tokens(name, folder, encoded(pipe, prompt), images)
