"""Images within a prompt: what their placeholders become, and which tokens their rows stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.processor import ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan


@dataclass(frozen=True)
class Placeholder:
    """How an image stands in a prompt.

    written: what a chat template writes for an image; `{number}` is the image's, from 1.
    token: the special token whose embeddings are replaced, one by one, by the image's rows.
    expand: what takes the place of `written` for an image of a plan, with `token` once a row.
    item: what stands for an image in a message where the chat template knows no images.
    media: what images are called in errors, since videos are placed alike.
    """

    written: str
    token: str
    expand: Callable[[ImageProcessor, ImagePlan], str]
    item: str
    media: str = "images"


def expand_placeholders(
    text: str, placeholder: Placeholder, processor: ImageProcessor, plans: Sequence[ImagePlan]
) -> str:
    """A rendered prompt with each image's placeholder expanded to the tokens of its plan.

    Raises RequestError where placeholders and images do not correspond.
    """
    numbered = "{number}" in placeholder.written
    pattern = r"(\d+)".join(re.escape(part) for part in placeholder.written.split("{number}"))
    found = list(re.finditer(pattern, text))
    numbers = [int(match[1]) for match in found] if numbered else range(1, len(found) + 1)
    if sorted(numbers) != list(range(1, len(plans) + 1)):
        raise RequestError(
            f"the prompt has {len(found)} placeholders {placeholder.written} for {len(plans)} "
            f"{placeholder.media}; give one for each, or none at all"
        )
    pieces, end = [], 0
    for match, number in zip(found, numbers, strict=True):
        pieces += [text[end : match.start()], placeholder.expand(processor, plans[number - 1])]
        end = match.end()
    return "".join([*pieces, text[end:]])


@dataclass(frozen=True)
class ImageSpan:
    """Where an image stands among a prompt's tokens.

    start, stop: its first token, and the one after its last.
    places: int32 [rows], the tokens within it that its rows stand for, counted from `start`: all of them but
        where breaks stand between lines.
    """

    start: int
    stop: int
    places: np.ndarray


def image_spans(ids: Sequence[int], tokens: Sequence[int], rows: Sequence[int]) -> list[ImageSpan]:
    """The spans of images that have so many rows each, `tokens` being the ids that stand for a row.

    Raises RequestError where the ids hold more or fewer of it, as where a user typed the token's text.
    """
    found = np.flatnonzero(np.isin(ids, tokens))
    if len(found) != sum(rows):
        raise RequestError(
            f"the prompt holds {len(found)} image tokens for {sum(rows)} rows of {len(rows)} images; "
            "leave the model's image tokens out of the text"
        )
    parts = np.split(found, np.cumsum(rows)[:-1]) if rows else []
    return [ImageSpan(int(at[0]), int(at[-1]) + 1, (at - at[0]).astype(np.int32)) for at in parts]
