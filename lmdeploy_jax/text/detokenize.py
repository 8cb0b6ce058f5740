"""Token ids to text as they are generated: new text only, never half a character, O(new tokens)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmdeploy_jax.text.pieces import ByteDecoding

_CONTEXT = 8  # prompt tokens that can still matter: an unfinished character (4 bytes), a word's joint
_MAX_HELD = 16  # tokens held back at most by a text decoder that keeps answering U+FFFD
_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What is asked of a tokenizer here."""

    decoding: ByteDecoding | None

    def decode_text(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...


class _Stream(Protocol):
    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """One stream of text. The pieces that `feed` and `finish` return join to `tokenizer.decode(all ids)`.

    prompt_ids: what stands before the stream. Nothing of it is returned; it decides whether the first token
        keeps its space, and it completes a character that the prompt left unfinished.
    """

    def __init__(
        self, tokenizer: Decoder, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._stream = open_stream(tokenizer, prompt_ids, skip_special_tokens)

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids add. A character that is not complete yet is held back."""
        return self._stream.feed(ids)

    def finish(self) -> str:
        """What was held back, unfinished characters as U+FFFD. Call once, at the end."""
        return self._stream.finish()


def open_stream(tokenizer: Decoder, prompt_ids: Sequence[int], skip_special_tokens: bool) -> _Stream:
    """The cheapest stream that is exact for this tokenizer."""
    if tokenizer.decoding is not None:
        return _ByteStream(tokenizer.decoding, prompt_ids, skip_special_tokens)
    return _TextStream(tokenizer, prompt_ids, skip_special_tokens)


class _ByteStream:
    """Tokens are bytes: look up, join, decode."""

    def __init__(self, decoding: ByteDecoding, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._pieces = decoding.visible if skip_special_tokens else decoding.pieces
        self._errors = decoding.errors
        self._unfinished = b""  # the beginning of a character
        self._strip = False
        self.feed(prompt_ids[-_CONTEXT:])
        self._strip = decoding.strip_space and not any(self._pieces[i] for i in prompt_ids)

    def feed(self, ids: Sequence[int]) -> str:
        pieces = self._pieces
        return self._decode(b"".join([pieces[i] for i in ids]), False)

    def finish(self) -> str:
        return self._decode(b"", True)

    def _decode(self, data: bytes, final: bool) -> str:
        data = self._unfinished + data
        text, used = codecs.utf_8_decode(data, self._errors, final)
        self._unfinished = data[used:]
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _TextStream:
    """The decoder works on text: decode the last stable piece together with the new ids and take the
    difference.

    The stable piece gives the decoder its context (WordPiece glues `##ing` to what stands before).
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stable = list(prompt_ids[-_CONTEXT:])
        self._held: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        self._held += ids
        text = self._new_text()
        if not text or (text.endswith(_REPLACEMENT) and len(self._held) <= _MAX_HELD):
            return ""
        self._settle()
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._settle()
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode_text(self._stable, self._skip)
        return self._tokenizer.decode_text(self._stable + self._held, self._skip)[len(before) :]

    def _settle(self) -> None:
        self._stable, self._held = self._held or self._stable, []


@dataclass
class DetokenizeState:
    """Where `Tokenizer.detokenize_incrementally` stands: how many ids it has seen, and the stream behind."""

    ids_offset: int = 0
    stream: IncrementalDetokenizer | None = None
