"""The prompt forms that a pipeline takes, brought to one list."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.conversation import ImagePart, Message, VideoPart, normalise_messages


@dataclass(frozen=True)
class Prompt:
    """One prompt, in exactly one of its three forms."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None  # normalised
    token_ids: tuple[int, ...] | None = None

    @property
    def has_images(self) -> bool:
        return any(isinstance(message.get("content"), list) for message in self.messages or ())


MEDIA_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")  # LMDeploy's names for options of all media


def with_media_options(prompt: Prompt, given: Mapping[str, Mapping[str, Any] | None]) -> Prompt:
    """The prompt with options of all its images and videos: under each of `MEDIA_OPTIONS`, LMDeploy's form
    {"image": {...}, "video": {...}}; one's own options hold before them. Raises `RequestError` for another
    form.
    """
    options: dict[str, dict[str, Any]] = {"image": {}, "video": {}}
    for name in MEDIA_OPTIONS:
        told = given.get(name) or {}
        if not _is_of_media(told, options):
            raise RequestError(
                f"{name}={told!r:.200} is not supported: give {{'image': {{...}}, 'video': {{...}}}}, the "
                "options of images and of videos.",
                param=name,
            )
        for kind, some in told.items():
            options[kind] |= some
    if not any(options.values()) or prompt.messages is None:
        return prompt
    return replace(prompt, messages=tuple(_with_options(message, options) for message in prompt.messages))


def _is_of_media(told: object, kinds: Container[str]) -> bool:
    return isinstance(told, Mapping) and all(
        kind in kinds and isinstance(some, Mapping) for kind, some in told.items()
    )


def _with_options(message: Message, given: Mapping[str, Mapping[str, Any]]) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": [_with_own(part, given) for part in content]}


def _with_own(part: str | ImagePart, given: Mapping[str, Mapping[str, Any]]) -> str | ImagePart:
    if isinstance(part, str):
        return part
    options = given.get("video" if isinstance(part, VideoPart) else "image", {})
    return replace(part, options={**options, **part.options})


def normalise_prompts(prompts: Any, *, images: bool = False) -> tuple[list[Prompt | RequestError], bool]:
    """Prompts as a list, and whether a single one was meant (then a single response is due).

    Forms: a text; a message; a list of messages (one conversation); a list of token ids (one prompt); a list
    of any of texts, conversations and lists of token ids (a batch); and, where the model takes `images`,
    pairs of a text and an image or images, which are paths, URLs, PIL images or arrays. One with images that
    it doesn't take, or malformed messages, stands as its error in the list: the others are good. Raises
    `ValueError` for any other form.
    """
    if isinstance(prompts, list) and not prompts:
        return [], False
    if _is_single(prompts):
        return [_prompt_or_error(prompts, prompts, images)], True
    if not isinstance(prompts, list):
        raise _unsupported(prompts)
    return [_prompt_or_error(item, prompts, images) for item in prompts], False


def _prompt_or_error(value: Any, prompts: Any, images: bool) -> Prompt | RequestError:
    try:
        return _prompt(value, prompts, images)
    except RequestError as error:
        return error


def _is_single(value: Any) -> bool:
    if isinstance(value, str | Mapping | tuple):
        return True
    return isinstance(value, list) and (_all(value, Mapping) or _is_ids(value))


def _prompt(value: Any, prompts: Any, images: bool) -> Prompt:
    if isinstance(value, str):
        return Prompt(text=value)
    if isinstance(value, Mapping):
        return Prompt(messages=tuple(normalise_messages([value], images=images)))
    if isinstance(value, list) and value and _all(value, Mapping):
        return Prompt(messages=tuple(normalise_messages(value, images=images)))
    if isinstance(value, list) and value and _is_ids(value):
        return Prompt(token_ids=tuple(int(i) for i in value))
    if isinstance(value, tuple) and is_image_pair(value):
        message = pair_message(value)
        if images or isinstance(message["content"], str):
            return Prompt(messages=tuple(normalise_messages([message], images=images)))
        raise RequestError(
            "Images are not supported by this model: give the text alone instead of a (text, image) pair."
        )
    raise _unsupported(prompts)


def is_image_pair(pair: tuple[Any, ...]) -> bool:
    """(text, image or [images]) or the other way round."""
    if len(pair) != 2:
        return False
    texts = [isinstance(item, str) and not _is_image(item) for item in pair]
    images = [_is_image(item) or (isinstance(item, list) and all(map(_is_image, item))) for item in pair]
    return (texts[0] and images[1]) or (images[0] and texts[1])


def pair_message(pair: tuple[Any, ...]) -> Message:
    """The user's message that a pair is, in its order."""
    parts: list[str | ImagePart] = []
    for item in pair:
        text = isinstance(item, str) and not _is_image(item)
        sources = item if isinstance(item, list) else [item]
        parts += [item] if text else [ImagePart(source) for source in sources]
    return {"role": "user", "content": parts if len(parts) > 1 else parts[0]}


def _is_image(item: Any) -> bool:
    if isinstance(item, str):
        return re.match(r"https?://\S+$|data:image", item, re.IGNORECASE) is not None
    # A PIL image or an array, without importing either's library.
    return isinstance(item, Path) or hasattr(item, "__array_interface__")


def _all(items: Sequence[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _is_ids(items: Sequence[Any]) -> bool:
    """Token ids, numpy's integers included."""
    return all(hasattr(item, "__index__") and not isinstance(item, bool) for item in items)


def _unsupported(prompts: Any) -> ValueError:
    return ValueError(
        f"Unsupported prompts: {prompts!r:.200}. Only support str, openai message format, or (prompt, image "
        "or [images]) or (image or [images], prompt) pair."
    )
