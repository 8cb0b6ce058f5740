"""Placeholders expand as transformers' processors expand them; spans find the rows' tokens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from lmdeploy_jax.converters.vision import read_vision
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.families import VISION_FAMILIES
from lmdeploy_jax.vision.placeholders import expand_placeholders, image_spans
from tests.vision.oracle import CONFIGS, hf_processor, save_checkpoint
from tests.vision.pictures import picture
from tests.vision.pillow import processed

SIZES = ((60, 85), (31, 40), (90, 30))
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "internvl_hf": {
        "start_image_token": "<img>", "end_image_token": "</img>", "image_token": "<IMG_CONTEXT>",
        "image_seq_length": 4,
    },
    "qwen2_vl": {"image_token": "<|image_pad|>"},
    "qwen2_5_vl": {"image_token": "<|image_pad|>"},
    "qwen3_vl": {"image_token": "<|image_pad|>"},
    "llava": {
        "image_token": "<image>", "patch_size": 4, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_next": {
        "image_token": "<image>", "patch_size": 4, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "gemma3": {
        "full_image_sequence": f"\n\n<start_of_image>{'<image_soft_token>' * 16}<end_of_image>\n\n",
    },
    "glm4v": {"image_token": "<|image|>"},
    "gemma4": {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_expansions_equal_transformers(name: str, checkpoints: Path) -> None:
    """By the processor's own method; building the processor whole would want a tokenizer and torchvision."""
    family, config = read_vision(save_checkpoint(name, checkpoints / name))
    processor_class = getattr(transformers, f"{CONFIGS[name].family}Processor")
    theirs = object.__new__(processor_class)
    theirs.image_processor = hf_processor(name)
    for attribute, value in ATTRIBUTES[name].items():
        setattr(theirs, attribute, value)
    for size in SIZES:
        inputs = processed(theirs.image_processor, picture(*size), "np")
        plan = config.processor.plan(*size)
        expanded = family.placeholder.expand(config.processor, plan)
        assert expanded == theirs.replace_image_token(inputs, 0)
        assert expanded.count(family.placeholder.token) == len(family.rows(config, plan))


def test_gemma_names_its_crops() -> None:
    theirs = object.__new__(transformers.Gemma3Processor)
    theirs.full_image_sequence = f"\n\n<start_of_image>{'<image_soft_token>' * 4}<end_of_image>\n\n"
    from lmdeploy_jax.vision.processor import ImageProcessor
    from lmdeploy_jax.vision.resize import PanAndScan

    processor = ImageProcessor(PanAndScan(16, 10, 4, 1.2), 4, 2)
    plan = processor.plan(20, 60)
    expanded = VISION_FAMILIES["Gemma3ForConditionalGeneration"].placeholder.expand(processor, plan)
    assert plan.views == 4
    assert expanded == theirs.replace_image_token({"num_crops": [3]}, 0)


def test_pixtral_breaks_lines(checkpoints: Path) -> None:
    family, config = read_vision(save_checkpoint("mistral3", checkpoints / "mistral3"))
    plan = config.processor.plan(12, 20)
    expanded = family.placeholder.expand(config.processor, plan)
    assert expanded == "[IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]"


def test_each_placeholder_gets_its_own_image(checkpoints: Path) -> None:
    family, config = read_vision(save_checkpoint("qwen2_vl", checkpoints / "qwen2_vl"))
    plans = [config.processor.plan(8, 8), config.processor.plan(8, 16)]
    pad = family.placeholder.token
    text = expand_placeholders(f"a{pad}b{pad}c", family.placeholder, config.processor, plans)
    assert text == f"a{pad}b{pad * 2}c"


def test_numbered_placeholders_may_come_in_any_order() -> None:
    from lmdeploy_jax.vision.processor import ImageProcessor
    from lmdeploy_jax.vision.resize import HDTransform

    family = VISION_FAMILIES["Phi3VForCausalLM"]
    processor = ImageProcessor(HDTransform(336, 16), 14, 2)
    plans = [processor.plan(600, 800), processor.plan(336, 336)]
    text = expand_placeholders("<|image_2|> and <|image_1|>", family.placeholder, processor, plans)
    second, first = (part.count("<|image|>") for part in text.split(" and "))
    assert first == 1921  # by the formula of the checkpoint's own code
    assert second != first


@pytest.mark.parametrize(("text", "images"), [("no place", 1), ("<image> <image>", 1), ("<image>", 0)])
def test_placeholders_and_images_must_correspond(text: str, images: int, checkpoints: Path) -> None:
    family, config = read_vision(save_checkpoint("llava", checkpoints / f"llava{images}{len(text)}"))
    with pytest.raises(RequestError, match=f"for {images} images"):
        expand_placeholders(
            text, family.placeholder, config.processor, [config.processor.plan(4, 4)] * images
        )


def test_spans() -> None:
    ids = [5, 10, 10, 12, 10, 10, 13, 7, 10, 6]
    first, second = image_spans(ids, [10], [4, 1])
    assert (first.start, first.stop, first.places.tolist()) == (1, 6, [0, 1, 3, 4])
    assert (second.start, second.stop, second.places.tolist()) == (8, 9, [0])
    assert image_spans([1, 2], [10], []) == []


def test_image_tokens_that_a_user_typed_are_refused() -> None:
    with pytest.raises(RequestError, match="leave the model's image tokens out"):
        image_spans([10, 10, 10], [10], [2])
