"""What reads a vocabulary's file, to the tokenizer that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lmdeploy_jax.text.pieces import ByteDecoding


class Backend(Protocol):
    """What a vocabulary file can do. `decoding` is None where tokens are not plain bytes."""

    size: int  # with added tokens
    base_size: int  # without
    decoding: ByteDecoding | None
    swallows_space: bool  # whether an added token takes the white space beside it with it

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    def get_vocab(self) -> dict[str, int]: ...

    def is_special(self, token_id: int) -> bool: ...


class TextBackend(Backend, Protocol):
    """A vocabulary whose tokens are not plain bytes, and that decodes by itself."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
