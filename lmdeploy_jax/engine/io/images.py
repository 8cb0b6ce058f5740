"""Images of a prompt: loaded, cut into patches, and given their tokens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import count, islice
from math import prod

import numpy as np

from lmdeploy_jax.errors import CheckpointError, ContextLengthError, RequestError
from lmdeploy_jax.prompt import RopePositions, Span, SpanImage
from lmdeploy_jax.text.conversation import ImagePart, Message, VideoPart
from lmdeploy_jax.text.tokenizer import Tokenizer
from lmdeploy_jax.vision.access import MediaAccess
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.families import VisionFamily
from lmdeploy_jax.vision.load import is_url, load_image
from lmdeploy_jax.vision.load_video import load_video
from lmdeploy_jax.vision.mrope import VisionGrid, mrope_positions
from lmdeploy_jax.vision.packing import most_places, size_of
from lmdeploy_jax.vision.placeholders import ImageSpan, expand_placeholders, image_spans
from lmdeploy_jax.vision.processor import ImageProcessor, ProcessedImage
from lmdeploy_jax.vision.resize import ImagePlan
from lmdeploy_jax.vision.video import FPS, VideoRule, prepare_video

# Images that are decoded at once, of whichever prompts: each may take hundreds of megabytes meanwhile.
_DECODING = threading.BoundedSemaphore(min(8, os.cpu_count() or 1))


class PromptImages:
    """How a model's prompts hold images. Every method may be called from any thread, off the event loop.

    Raises CheckpointError for a tokenizer without the token that stands for a row.
    """

    def __init__(
        self, family: VisionFamily, config: VisionModelConfig, tokenizer: Tokenizer, session_len: int
    ) -> None:
        self._family, self._config = family, config
        self._most = most_places(config, session_len)
        known = (family.placeholder, *(() if family.video is None else (family.video.placeholder,)))
        self._tokens = [_id(tokenizer, placeholder.token) for placeholder in known]

    def parts(self, messages: Sequence[Message]) -> list[ImagePart]:
        """The images of a conversation, in order."""
        contents = (message.get("content") for message in messages)
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if isinstance(part, ImagePart)]

    def loaded(self, parts: Sequence[ImagePart], access: MediaAccess, most: int) -> list[ProcessedImage]:
        """The patches of a prompt's images.

        Raises RequestError for one that cannot be had, or not as it is asked for, ContextLengthError as soon
        as they have `most` rows.
        """
        rules = [self._rule(part) for part in parts]
        fetched = _fetched(parts, access)
        images, rows = [], 0
        for part, rule in zip(parts, rules, strict=True):
            check = partial(self._check, rows, most)
            with _DECODING, _naming(part):
                if isinstance(rule, VideoRule):
                    video = load_video(part.source, access, fetched, fps=part.options.get("fps", FPS))
                    image = prepare_video(self._config.processor, rule, video, part.options, check)
                else:
                    picture = load_image(part.source, access, fetched)
                    check(rule.plan(picture.height, picture.width))
                    image = rule(picture)
            images.append(image)
            rows += self._rows(image.plan)
        return images

    def _rule(self, part: ImagePart) -> ImageProcessor | VideoRule:
        """How it is prepared, as it is asked for."""
        with _naming(part):
            if not isinstance(part, VideoPart):
                return self._config.processor.with_options(part.options)
            if self._config.video is None:
                raise RequestError("videos are not supported by this model. Give images.")
            return self._config.video.with_options(part.options)

    def _check(self, before: int, most: int, plan: ImagePlan) -> None:
        """Before it is cut into patches, what comes after so many rows of other images."""
        self._check_size(plan)
        if (rows := before + self._rows(plan)) >= most:
            raise _too_long(rows, most)

    def _rows(self, plan: ImagePlan) -> int:
        return len(self._family.rows(self._config, plan))

    def _check_size(self, plan: ImagePlan) -> None:
        """Raises RequestError for a view that no run of the encoder takes."""
        grid = self._config.processor.grid(plan)
        if self._most is not None and size_of(self._config, grid) > self._most:
            raise RequestError(
                f"it would be encoded as {plan.width} x {plan.height} pixels, {prod(grid)} patches, of which "
                f"this model takes {self._most} here; make it smaller, or lower its max_pixels"
            )

    def written(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with each image as the text that stands for it, which templates of text models print
        too.
        """
        numbers = count(1)
        return [
            message | {"content": "".join(self._text(part, numbers) for part in content)}
            if isinstance(content := message.get("content"), list)
            else message
            for message in messages
        ]

    def _text(self, part: str | ImagePart, numbers: Iterator[int]) -> str:
        if isinstance(part, str):
            return part
        if isinstance(part, VideoPart) and self._family.video is not None:
            return self._family.video.placeholder.item
        return self._family.placeholder.item.replace("{number}", str(next(numbers)))

    def expand(self, text: str, images: Sequence[ProcessedImage]) -> str:
        """A rendered prompt with a token for each row. Raises RequestError where a text holds such tokens."""
        processor = self._config.processor
        pictures, videos = ([i.plan for i in images if i.plan.is_video is video] for video in (False, True))
        text = expand_placeholders(text, self._family.placeholder, processor, pictures)
        if self._family.video is None:
            return text
        return expand_placeholders(text, self._family.video.placeholder, processor, videos)

    def placed(
        self, ids: Sequence[int], images: Sequence[ProcessedImage]
    ) -> tuple[tuple[Span, ...], tuple[SpanImage, ...], RopePositions | None]:
        """The spans of a prompt's tokens that stand for the images and the views of videos, what these are
        encoded from, and what the tokens turn by.
        """
        parts = [part for image in images for part in image.parts()]
        rows = [self._family.rows(self._config, part.plan) for part in parts]
        found = image_spans(ids, self._tokens, [len(each) for each in rows])
        spans = tuple(map(_span, found, parts))
        encoded = tuple(map(self._given, parts, rows, found))
        return spans, encoded, self._rope(len(ids), spans, images) if self._family.mrope else None

    def _given(self, image: ProcessedImage, rows: np.ndarray, at: ImageSpan) -> SpanImage:
        tokens = image.patches.shape[1] // self._config.processor.merge**2
        size = size_of(self._config, image.grid)
        return SpanImage(image.patches, image.grid, rows, at.places, tokens, size)

    def _rope(self, length: int, spans: Sequence[Span], images: Sequence[ProcessedImage]) -> RopePositions:
        """A video is one grid, unless the times of its views stand between them."""
        grids, starts = [], iter([span.start for span in spans])
        for image in images:
            plan, size = image.plan, self._config.processor.tokens(image.plan)
            own = list(islice(starts, plan.views if plan.is_video else 1))
            if plan.is_video and not plan.times:
                grids.append(VisionGrid(own[0], *size, plan.views, plan.interval or 1.0))
            else:
                grids += [VisionGrid(start, *size) for start in own]
        return RopePositions(*mrope_positions(length, grids))


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(
            f"the tokenizer has no token {token}, which stands for images; download the checkpoint's "
            "tokenizer files again"
        )
    return found


def _fetched(parts: Sequence[ImagePart], access: MediaAccess) -> dict[str, bytes | RequestError]:
    """What the URLs among the sources give."""
    sources = [part.source if isinstance(part.source, list | tuple) else [part.source] for part in parts]
    urls = [source for each in sources for source in each if is_url(source)]
    if not urls:
        return {}
    from lmdeploy_jax.vision.fetch import fetch  # aiohttp is loaded with the first URL

    return fetch(urls, access)


@contextmanager
def _naming(part: ImagePart) -> Iterator[None]:
    """Errors say which image they are about."""
    try:
        yield
    except ContextLengthError:
        raise
    except RequestError as error:
        raise RequestError(f"{part.where}: {error}", param=part.where) from error


def _too_long(rows: int, most: int) -> ContextLengthError:
    return ContextLengthError.of(f"at least {rows} tokens of images", most)


def _span(at: ImageSpan, image: ProcessedImage) -> Span:
    """Images that are cut alike into the same patches are the same to the model."""
    content = sha256(repr((image.plan, image.grid, image.patches.dtype.str)).encode())
    content.update(image.patches.tobytes())
    return Span(at.start, at.stop - at.start, content.digest())
