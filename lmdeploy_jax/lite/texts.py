"""Text to calibrate on, as windows of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_jax import assets
from lmdeploy_jax.assets import tasks
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.text.chat_template import ChatTemplate, select
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.tokenizer import Tokenizer

SEED = 0
BETWEEN = "\n\n"  # documents
LINES = (".jsonl", ".json")
Render = Callable[[tasks.Conversation], str]


class Texts:
    """The texts for a model of `folder`, whose tokenizer and chat template they go through."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer(folder, trust_remote_code)
        self._template: ChatTemplate = select(self._tokenizer, folder)

    def of_file(self, file: Path, samples: int, length: int) -> np.ndarray:
        """Windows [samples, length] drawn from a file: text, or JSON lines with `text` or `messages` each.

        Raises ConfigError where the file has less than one window.
        """
        documents = list(self._documents(file))
        return self._drawn(self._encode(BETWEEN.join(documents)), samples, length, str(file))

    def built_in(self, samples: int, length: int) -> np.ndarray:
        """Windows of conversations that the embedded models are trained on; for other models they alternate
        with the reference of the Python language, which comes with every interpreter.
        """
        if self._folder in map(assets.resolve, assets.names()):
            return self._filled(self._conversations(), samples, length)
        talk = self._filled(self._conversations(), samples - samples // 2, length)
        ids = self._encode(BETWEEN.join(_reference()))
        return np.concatenate([talk, self._drawn(ids, samples // 2, length, "the built-in text")])

    def _documents(self, file: Path) -> Iterator[str]:
        text = _read(file)
        if file.suffix not in LINES:
            yield text
            return
        for number, line in enumerate(text.split("\n"), 1):  # strings of JSON may hold other line breaks
            if line.strip():
                yield self._document(line, f"{file}: line {number}")

    def _document(self, line: str, where: str) -> str:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where} is no JSON: {error}") from error
        if isinstance(found, dict) and isinstance(found.get("text"), str):
            return found["text"]
        if isinstance(found, dict) and isinstance(found.get("messages"), list):
            return self._talk(found["messages"], where)
        raise ConfigError(
            f"{where} has neither a text 'text' nor a list 'messages'; give one JSON object a line, or text "
            "in a file of another name"
        )

    def _talk(self, messages: list[Any], where: str) -> str:
        try:
            return self._template.render(normalise_messages(messages), add_generation_prompt=False)
        except RequestError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _conversations(self) -> Iterator[str]:
        rng = random.Random(SEED)
        while True:
            drawn = tasks.training_conversation(rng)
            tools = list(drawn.tools) if drawn.tools else None
            messages = normalise_messages(list(drawn.messages))
            yield self._template.render(messages, tools=tools, add_generation_prompt=False, **drawn.template)

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_bos=False), np.int32)

    def _filled(self, documents: Iterable[str], samples: int, length: int) -> np.ndarray:
        """Windows one after another of documents without end."""
        ids: list[int] = []
        for document in documents:
            if len(ids) >= samples * length:
                break
            ids += self._tokenizer.encode(document, add_bos=False)
        return np.array(ids[: samples * length], np.int32).reshape(samples, length)

    def _drawn(self, ids: np.ndarray, samples: int, length: int, where: str) -> np.ndarray:
        if len(ids) < length:
            shorter = f", or a --calib-seqlen of at most {len(ids)}" if len(ids) else ""
            raise ConfigError(
                f"{where} has {len(ids)} tokens, fewer than a sample's {length}; give more text{shorter}"
            )
        rng = random.Random(SEED)
        firsts = [rng.randint(0, len(ids) - length) for _ in range(samples)]
        return np.stack([ids[first : first + length] for first in firsts]) if firsts else _none(length)


def _none(length: int) -> np.ndarray:
    return np.zeros((0, length), np.int32)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--calib-data {file}: cannot be read: {error}; give a file of UTF-8 text"
        ) from error


def _reference() -> Iterable[str]:
    from pydoc_data.topics import topics

    return topics.values()
