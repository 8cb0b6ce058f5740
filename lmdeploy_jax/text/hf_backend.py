"""tokenizer.json, and what else becomes one, through the `tokenizers` library."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tokenizers

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text.pieces import ByteDecoding, DecoderKind, byte_decoding, classify_decoder
from lmdeploy_jax.text.prefix_space import with_prefix_space
from lmdeploy_jax.text.settings import MAX_ID, AddedToken, TokenizerSettings

logger = logging.getLogger("lmdeploy_jax")

# Characters from which on the interpreter's lock is released, which only the calls for batches do. To get it
# back may take longer than a short text does.
_LONG = 4096


class HfBackend:
    """A `tokenizers.Tokenizer` with the added tokens that the files beside it name."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self._tokenizer = with_prefix_space(tokenizer, settings.config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _add_missing(self._tokenizer, settings)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.swallows_space = any(token.lstrip or token.rstrip for token in added.values())
        self.base_size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        self.size = self._tokenizer.get_vocab_size()
        self.decoding = self._decoding()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < _LONG:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The library's own decoding, for decoders that work on text."""
        known = [i for i in ids if 0 <= i <= MAX_ID]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id <= MAX_ID else None

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _decoding(self) -> ByteDecoding | None:
        decoder = self._tokenizer.decoder
        kind = classify_decoder(json.loads(decoder.__getstate__()) if decoder else None)
        if kind is None:
            return None
        return byte_decoding(partial(self._piece, kind), self.is_special, kind.errors, kind.strip_space)

    def _piece(self, kind: DecoderKind, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        return kind.piece(token) if token is not None else b""


def load_json(path: Path) -> tokenizers.Tokenizer:
    """Raises CheckpointError."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}. "
            "Download the file again, or upgrade the tokenizers package if the file is newer than it."
        ) from error


def _add_missing(tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """Adds what tokenizer.json lacks: tokens with ids first, in order, then the other special tokens.

    What it knows gets the flags of the files beside it, and is special if either says so or it has a name.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    added: dict[str, tokenizers.AddedToken] = {}  # added at once: each time, the library sets up its search
    for token in settings.added.values():
        there = known.get(token.content)
        added[token.content] = _native(token, token.special or (there is not None and there.special))
    for named in filter(None, settings.named.values()):
        there = added.get(named.content) or known.get(named.content)
        added[named.content] = _native(there or named, True)
    for extra in settings.extra:
        if extra.content not in known:
            added.setdefault(extra.content, _native(extra, True))
    tokenizer.add_tokens([t for t in added.values() if not _same(t, known.get(t.content))])
    for token_id, token in settings.added.items():
        _check_id(tokenizer, token.content, token_id)


_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def _same(token: tokenizers.AddedToken, there: tokenizers.AddedToken | None) -> bool:
    return there is not None and all(getattr(token, flag) == getattr(there, flag) for flag in _FLAGS)


def _native(token: AddedToken | tokenizers.AddedToken, special: bool) -> tokenizers.AddedToken:
    flags = {flag: getattr(token, flag) for flag in _FLAGS} | {"special": special}
    return tokenizers.AddedToken(token.content, **flags)


def _check_id(tokenizer: tokenizers.Tokenizer, content: str, token_id: int) -> None:
    actual = tokenizer.token_to_id(content)
    if actual != token_id:
        logger.warning(
            "added token %r has id %s in tokenizer.json but %s in the files beside it; using %s",
            content, actual, token_id, actual,
        )  # fmt: skip
