"""The tokenizer of a checkpoint folder, without transformers: text to ids and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from lmdeploy_jax.errors import CheckpointError, RequestError
from lmdeploy_jax.text.backend import Backend, TextBackend
from lmdeploy_jax.text.detokenize import DetokenizeState, IncrementalDetokenizer, open_stream
from lmdeploy_jax.text.settings import TokenizerSettings, read_eos_ids, read_settings

logger = logging.getLogger("lmdeploy_jax")

# Texts with more characters for each allowed token than ordinary text has, and texts of more than _UNREAD
# characters, are counted roughly before they are encoded, since that takes up to 400 bytes a token.
_ROOMY, _UNREAD = 6, 1 << 20
_SLICE = 1 << 16  # characters
_BY_CUTS = 2048  # tokens by which cuts within words may raise the rough count


class Tokenizer:
    """Text to ids and back, as HF's tokenizer of the same folder does it.

    model_path: a checkpoint folder with tokenizer.json or tokenizer.model, an embedded model's name, or a hub
        id, of which all but the weights are downloaded. Settings come from tokenizer_config.json,
        special_tokens_map.json, added_tokens.json and generation_config.json.
    trust_remote_code: whether Python code of the checkpoint may be run where nothing else reads its
        vocabulary and transformers is installed.

    Ids that the vocabulary lacks decode to "". Where bytes are not UTF-8, byte-level tokenizers give U+FFFD
    per malformed sequence, sentencepiece ones per byte. Raises `CheckpointError` if there is no usable
    vocabulary.
    """

    def __init__(self, model_path: str | Path, trust_remote_code: bool = False) -> None:
        self.folder = _folder(model_path)
        self.settings = read_settings(self.folder)
        self._model_eos_ids = read_eos_ids(self.folder)
        self._backend = _open_backend(self.folder, self.settings, trust_remote_code)
        self.decoding = self._backend.decoding
        self._warned_bos = False

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, as in HF; `len()` counts them too."""
        return self._backend.base_size

    def __len__(self) -> int:
        return self._backend.size

    @cached_property
    def bos_token(self) -> str | None:
        return self._named("bos_token")

    @cached_property
    def eos_token(self) -> str | None:
        return self._named("eos_token")

    @cached_property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @cached_property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own, else the first one of generation_config.json."""
        own = self._id_of(self.eos_token)
        return own if own is not None else next(iter(self._model_eos_ids), None)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation: the tokenizer's and those of generation_config.json, each once."""
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys(own + self._model_eos_ids))

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Ids of `s`, with the special tokens that the checkpoint puts around a text.

        A second leading BOS (a chat template wrote one too) is dropped with a warning; `add_bos=False` drops
        both. Raises `RequestError` for a text with lone surrogates.
        """
        _check_unicode(s)
        ids = self._backend.encode(s, add_special_tokens)
        bos = self.bos_token_id
        if bos is None or ids[:1] != [bos]:
            return ids
        if ids[:2] == [bos, bos]:
            self._warn_bos()
            ids = ids[1:]
        return ids if add_bos else ids[1:]

    def exceeds(self, text: str, most: int) -> bool:
        """Whether a long text certainly has more than `most` tokens, found out without tokenising it whole.

        Its beginning is tokenised in slices until they have twice as many, so that the time and memory spent
        follow `most` and not the text. False says nothing: `encode` and count.
        """
        if len(text) <= min(most * _ROOMY, max(most, _UNREAD)):
            return False
        found = 0
        for place in range(0, len(text), _SLICE):
            part = text[place : place + _SLICE]
            _check_unicode(part)
            # White space at a cut may belong to a token beyond it that swallows it.
            part = part.strip() if self._backend.swallows_space else part
            found += len(self._backend.encode(part, add_special_tokens=False))
            if found > 2 * (most + _BY_CUTS):
                return True
        return False

    def decode(self, ids: Sequence[int], offset: int | None = None, skip_special_tokens: bool = True) -> str:
        """Text of `ids[offset:]`."""
        ids = ids[offset:] if offset else ids
        stream = open_stream(self, (), skip_special_tokens)
        return stream.feed(ids) + stream.finish()

    def decode_text(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The vocabulary's own decoding, for streams whose tokens are not plain bytes."""
        return cast(TextBackend, self._backend).decode(ids, skip_special_tokens)

    def __call__(self, s: str | Sequence[str]) -> SimpleNamespace:
        """`.input_ids` of one text (a list of ids) or of several (a list of lists)."""
        ids = self.encode(s) if isinstance(s, str) else [self.encode(text) for text in s]
        return SimpleNamespace(input_ids=ids)

    def detokenize_incrementally(
        self,
        all_input_ids: Sequence[int],
        state: DetokenizeState,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> tuple[str, DetokenizeState]:
        """New text of a growing list of ids. Ids before `state.ids_offset` are context (a prompt).

        spaces_between_special_tokens: of LMDeploy's signature. No spaces are put, as in HF's fast tokenizers.
        """
        new = all_input_ids[state.ids_offset :]
        stream = state.stream or IncrementalDetokenizer(
            self, all_input_ids[: state.ids_offset], skip_special_tokens
        )
        return stream.feed(new), DetokenizeState(len(all_input_ids), stream)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, in the vocabulary's own spelling, with added tokens."""
        return self._backend.get_vocab()

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id; None beyond the vocabulary."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, such as `<|im_end|>`; None if there is none."""
        return self._backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves the id out."""
        return self._backend.is_special(token_id)

    def token_to_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, special tokens and leading spaces included."""
        if self.decoding is not None:
            return self.decoding.pieces[token_id]
        return self.decode_text([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """A token alone as text; U+FFFD where it is a part of a character."""
        return self.token_to_bytes(token_id).decode(errors="replace")

    def indexes_containing_token(self, token: str) -> list[int]:
        """Every id whose text contains `token`; if there is none, the ids that `token` is encoded to."""
        found = [i for i in range(len(self)) if token in self.token_text(i)]
        return found or self.encode(token, add_bos=False, add_special_tokens=False)

    def _named(self, name: str) -> str | None:
        if name in self.settings.named:
            token = self.settings.named[name]
            return token.content if token else None
        return getattr(self._backend, "named", {}).get(name)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.token_to_id(token)

    def _warn_bos(self) -> None:
        if not self._warned_bos:
            self._warned_bos = True
            logger.warning(
                "a prompt began with two BOS tokens (%r); one was dropped. The chat template writes one and "
                "the tokenizer adds one. This is said once.",
                self.bos_token,
            )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text is not valid Unicode: a lone surrogate {text[error.start]!a} stands at character "
            f"{error.start}. Send complete characters."
        ) from error


def _folder(model_path: str | Path) -> Path:
    path = Path(model_path).expanduser()
    if path.is_file():
        return path.parent
    from lmdeploy_jax.hub import resolve_model  # the hub's client is loaded only where a name may be an id

    return resolve_model(model_path, weights=False)


def _open_backend(folder: Path, settings: TokenizerSettings, trust_remote_code: bool) -> Backend:
    if (folder / "tokenizer.json").is_file():
        from lmdeploy_jax.text.hf_backend import HfBackend, load_json

        return HfBackend(load_json(folder / "tokenizer.json"), settings)
    if _holds_tiktoken(folder):
        from lmdeploy_jax.text.hf_backend import HfBackend
        from lmdeploy_jax.text.tiktoken_files import find_tiktoken, read_tiktoken

        found = find_tiktoken(folder, settings)
        if found is not None:
            return HfBackend(*read_tiktoken(*found, settings))
    if (folder / "tokenizer.model").is_file():
        from lmdeploy_jax.text.sp_backend import SentencePieceBackend

        return SentencePieceBackend(folder / "tokenizer.model", settings)
    from lmdeploy_jax.text.transformers_backend import VOCABULARIES, open_transformers

    if any(path for name in VOCABULARIES for path in folder.glob(name)):
        return open_transformers(folder, settings, trust_remote_code=trust_remote_code)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor tokenizer.model. Download the tokenizer's files into it."
    )


def _holds_tiktoken(folder: Path) -> bool:
    return (folder / "tiktoken.model").is_file() or any(folder.glob("*.tiktoken"))
