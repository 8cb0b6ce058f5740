"""tokenizer.model of Llama 1/2, InternLM and their kin, through sentencepiece itself.

Added tokens are cut out of the text first; what lies between them goes to sentencepiece, which releases the
interpreter's lock meanwhile. Its dummy prefix (a
space put before the text) goes before every piece of text (`legacy`, the way these checkpoints were trained),
or only before text at the very start (`legacy: false` in tokenizer_config.json), as in HF's LlamaTokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text.added_tokens import AddedTokenCutter
from lmdeploy_jax.text.pieces import EACH_BYTE, SPACE_MARK, ByteDecoding, byte_decoding, sentencepiece_piece
from lmdeploy_jax.text.settings import SAVE_FAST, AddedToken, TokenizerSettings

if TYPE_CHECKING:
    import sentencepiece

# A ModelProto fragment: normalizer_spec { add_dummy_prefix: false }. Protobuf merges repeated submessages,
# the last value winning, so that appending it switches the prefix off without a protobuf dependency.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceBackend:
    """A sentencepiece model with added tokens around it."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        self._model = _load(path)
        config = settings.config
        self._first, self._rest, prefixed = _prefix_models(self._model, config)
        self.base_size = self._model.vocab_size()
        self._added = self._collect_added(settings)
        self._ids = {token.content: i for i, token in self._added.items()}
        self._cutter = AddedTokenCutter(self._added)
        self.swallows_space = any(token.lstrip or token.rstrip for token in self._added.values())
        self.size = max(self.base_size, 1 + max(self._added, default=-1))
        self._bos = self._ids[self.named["bos_token"]] if self._adds(config, "bos_token", True) else None
        self._eos = self._ids[self.named["eos_token"]] if self._adds(config, "eos_token", False) else None
        self.decoding: ByteDecoding | None = byte_decoding(self._piece, self.is_special, EACH_BYTE, prefixed)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._body(text))
        if add_special_tokens and self._bos is not None:
            ids.insert(0, self._bos)
        if add_special_tokens and self._eos is not None:
            ids.append(self._eos)
        return ids

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        return self._model.id_to_piece(token_id) if 0 <= token_id < self.base_size else None

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self._piece_id(token))

    def get_vocab(self) -> dict[str, int]:
        tokens = ((self.id_to_token(i), i) for i in range(self.size))
        return {token: i for token, i in tokens if token is not None}

    def is_special(self, token_id: int) -> bool:
        if token_id in self._added:
            return self._added[token_id].special
        return 0 <= token_id < self.base_size and self._model.is_control(token_id)

    def _body(self, text: str) -> Iterator[int]:
        """Ids of the text without BOS and EOS."""
        end, model = 0, self._first
        for start, stop, token_id in self._cutter.find(text):
            yield from model.encode(text[end:start], out_type=int)
            yield token_id
            end, model = stop, self._rest
        yield from model.encode(text[end:], out_type=int)

    def _piece(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        return token.encode() if token_id in self._added else sentencepiece_piece(token)

    def _piece_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def _collect_added(self, settings: TokenizerSettings) -> dict[int, AddedToken]:
        """Every token to be cut out of the text. Special tokens without an id are put after the last one."""
        self.named = self._named(settings)
        added = dict(settings.added)
        contents = {token.content for token in added.values()}
        extra = [t for t in (*settings.named.values(), *settings.extra) if t]
        extra += [AddedToken(content) for content in self.named.values()]
        for token in extra:
            if token.content not in contents:
                token_id = self._piece_id(token.content)
                next_free = max(self.base_size, 1 + max(added, default=-1))
                added[next_free if token_id is None else token_id] = token
                contents.add(token.content)
        return added

    def _named(self, settings: TokenizerSettings) -> dict[str, str]:
        """BOS, EOS and UNK: the files' names for them, else the model's own."""
        own = {
            "bos_token": self._model.bos_id(),
            "eos_token": self._model.eos_id(),
            "unk_token": self._model.unk_id(),
        }
        named = {name: self._model.id_to_piece(i) for name, i in own.items() if i >= 0}
        for name, token in settings.named.items():
            if token is None:
                named.pop(name, None)
            else:
                named[name] = token.content
        return named

    def _adds(self, config: dict[str, Any], name: str, default: bool) -> bool:
        value = config.get(f"add_{name}")
        return name in self.named and (default if value is None else bool(value))


def _prefix_models(
    model: sentencepiece.SentencePieceProcessor, config: dict[str, Any]
) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor, bool]:
    """Models for the first piece of text and for the rest; whether the first puts a space before its text."""
    prefixed = model.normalize("a").startswith(SPACE_MARK)
    if not prefixed:
        return model, model, False
    never = config.get("add_prefix_space") is False
    if not never and config.get("legacy") is not False:
        return model, model, True
    bare = _processor(model.serialized_model_proto() + _NO_DUMMY_PREFIX)
    return (bare, bare, False) if never else (model, bare, True)


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return _processor(path.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} is not a sentencepiece model ({error}). If it is tiktoken's (GLM-4, Qwen-1), write "
            f"a tokenizer.json beside it, where transformers is installed: {SAVE_FAST}."
        ) from error


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece  # loaded only for checkpoints that need it

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(proto)
    return model
