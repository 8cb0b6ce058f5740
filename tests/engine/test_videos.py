"""Videos through the pipeline: the tokens that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.vision.load_video import load_video
from lmdeploy_jax.vision.pixels import normalize
from lmdeploy_jax.vision.processor import ProcessedImage
from lmdeploy_jax.vision.video import prepare_video
from tests.engine.test_images import COUNT, GREEDY, ONE, PLACEHOLDER, Open, encoded, opened, save
from tests.vision.oracle import hf_model, hf_processor
from tests.vision.pictures import picture
from tests.vision.pillow import processed

__all__ = ["opened"]
VIDEO = 107  # the token that `save` gives videos
FRAMES = [picture(40, 56, seed=seed) for seed in range(5)]
BOUNDS = {"min_pixels": 64, "max_pixels": 4096, "fps": 2.0}


def message(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "w5 w6"}, *parts]}]


def shown(**more: Any) -> dict[str, Any]:
    return {"type": "video", "video": FRAMES, **BOUNDS, **more}


@torch.no_grad()
def hf_tokens(name: str, folder: Path, ids: list[int], done: ProcessedImage) -> list[int]:
    """What transformers answers to ids with `ONE` and a video. transformers prepares no videos without
    torchvision: its patches are ours, which `tests.vision` holds against it otherwise.
    """
    _, config = read_vision(folder)
    shape = (*done.patches.shape[:2], 3, -1)
    values = done.patches.reshape(shape).swapaxes(2, 3)
    values = normalize(values, config.processor.mean, config.processor.std).swapaxes(2, 3)
    tokens, images = torch.tensor([ids]), processed(hf_processor(name), [ONE], "pt")
    given = {
        "pixel_values": images["pixel_values"],
        "image_grid_thw": images["image_grid_thw"],
        "pixel_values_videos": torch.tensor(values.reshape(-1, done.patches.shape[2])),
        "video_grid_thw": torch.tensor([[len(done.patches), *done.grid]]),
        "mm_token_type_ids": (tokens == PLACEHOLDER).int() + 2 * (tokens == VIDEO).int(),
    }
    if name == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([2 / BOUNDS["fps"]])
    model = hf_model(name, folder)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given, **options)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.full)])
def test_answers_equal_transformers(name: str, tmp_path: Path, opened: Open) -> None:
    """transformers goes wrong with the text behind videos whose last view is later than their edges are long
    (see `tests.vision.test_mrope`); this one is short.
    """
    folder = save(name, tmp_path / name)
    pipe = opened(folder)
    prompt = message({"type": "image", "image": ONE}, {"type": "text", "text": "w7"}, shown())
    answer = pipe(prompt, GREEDY)
    _, config = read_vision(folder)
    assert config.video is not None
    rule = config.video.with_options(BOUNDS)
    done = prepare_video(config.processor, rule, load_video(FRAMES, fps=2.0), BOUNDS, lambda plan: None)
    assert len(done.patches) == 3
    ids = encoded(pipe, prompt)
    assert ids.count(VIDEO) == 3 * np.prod(done.grid) // 4
    assert answer.token_ids == hf_tokens(name, folder, ids, done)
    again = pipe(prompt, GREEDY)
    assert again.token_ids == answer.token_ids
    assert again.cached_tokens == (len(ids) - 1) // 64 * 64
    slower = pipe(message(shown(fps=0.25)), GREEDY)
    assert slower.cached_tokens == 0 or name == "qwen2_vl"
    for part, said in (
        (shown(num_frames=2, fps=None), "of a list all are taken"),
        (shown(video=None), "no video"),
        (shown(max_pixels=2**24, min_pixels=2**22), "it would be encoded as"),
    ):
        refused = pipe([message(part)], GREEDY)[0]
        assert said in (refused.error_message or "")


def test_other_models_take_none(tmp_path: Path, opened: Open) -> None:
    pipe = opened(save("mistral3", tmp_path / "mistral3"))
    refused = pipe([message(shown())], GREEDY)[0]
    assert "content[1]: videos are not supported by this model" in (refused.error_message or "")
