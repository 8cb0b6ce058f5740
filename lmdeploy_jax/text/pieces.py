"""Token id -> bytes, for tokenizers whose text is the plain concatenation of their tokens' bytes.

Byte-level BPE and sentencepiece-style vocabularies are all of that kind. A table lookup and one UTF-8 decoder
then make streaming exact and O(1) a token. Anything else (WordPiece, CTC) is decoded as text, see
`detokenize.py`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPACE_MARK = "▁"
EACH_BYTE = "lmdeploy_jax.each_byte"  # codec error handler: one U+FFFD for every byte that is not UTF-8
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class PieceTable(dict[int, bytes]):
    """The bytes of every token id, filled in as ids come up."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        super().__init__()
        self._piece = piece

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._piece(token_id)
        return data


@dataclass(frozen=True)
class ByteDecoding:
    """How ids become text: look the bytes up, join, decode as UTF-8."""

    pieces: PieceTable
    visible: PieceTable  # the same with special tokens empty
    errors: str  # codec error handler
    strip_space: bool  # whether the text's first space was put there by the encoder


def byte_decoding(
    piece: Callable[[int], bytes], is_special: Callable[[int], bool], errors: str, strip_space: bool
) -> ByteDecoding:
    pieces = PieceTable(piece)
    visible = PieceTable(lambda i: b"" if is_special(i) else pieces[i])
    return ByteDecoding(pieces, visible, errors, strip_space)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's stand-ins: printable latin-1 bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()
_CHARACTERS = {byte: char for char, byte in _ALPHABET.items()}


def byte_level_token(data: bytes) -> str:
    """The other way round."""
    return "".join(map(_CHARACTERS.__getitem__, data))


def byte_level_piece(token: str) -> bytes:
    """Bytes of a byte-level token. Tokens outside the alphabet stand for themselves, as in `tokenizers`."""
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode()


def sentencepiece_piece(token: str, byte_fallback: bool = True) -> bytes:
    """Bytes of a sentencepiece-style token: ▁ is a space, <0xE4> a byte."""
    match = BYTE_PIECE.fullmatch(token) if byte_fallback else None
    return bytes([int(match[1], 16)]) if match else token.replace(SPACE_MARK, " ").encode()


@dataclass(frozen=True)
class DecoderKind:
    """What a tokenizer.json's `decoder` amounts to."""

    piece: Callable[[str], bytes]
    errors: str
    strip_space: bool


def classify_decoder(decoder: dict[str, Any] | None) -> DecoderKind | None:
    """Recognises the decoders of byte-level and sentencepiece-style tokenizers; None for any other."""
    steps = [] if decoder is None else decoder.get("decoders", [decoder])
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return DecoderKind(byte_level_piece, "replace", False)
    if names in (_METASPACE_STEPS, _METASPACE_STEPS[:3]) and _replaces_marks(steps[0]):
        strip = steps[3:]
        if all((s["content"], s["start"], s["stop"]) == (" ", 1, 0) for s in strip):
            return DecoderKind(sentencepiece_piece, EACH_BYTE, bool(strip))
    return None


_METASPACE_STEPS = ["Replace", "ByteFallback", "Fuse", "Strip"]


def _replaces_marks(step: dict[str, Any]) -> bool:
    return step["pattern"] == {"String": SPACE_MARK} and step["content"] == " "
