"""Vocabularies that only Python code can read, through transformers where it is installed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.text.backend import Backend
from lmdeploy_jax.text.pieces import ByteDecoding
from lmdeploy_jax.text.settings import SAVE_FAST, TokenizerSettings

VOCABULARIES = ("vocab.json", "vocab.txt", "*.tiktoken", "tiktoken.model", "tokenization_*.py")


def open_transformers(folder: Path, settings: TokenizerSettings, *, trust_remote_code: bool) -> Backend:
    """What transformers makes of the folder. Raises CheckpointError where it may or can not read it."""
    files = ", ".join(path.name for name in VOCABULARIES for path in sorted(folder.glob(name)))
    held = f"{folder} has neither tokenizer.json nor tokenizer.model, only {files}"
    if _names_own_code(settings) and not trust_remote_code:
        raise CheckpointError(
            f"{held}, which the checkpoint's own Python code reads. Trust it with trust_remote_code=True "
            f"(--trust-remote-code), which runs that code, or once, elsewhere, run {SAVE_FAST}."
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{held}, which transformers reads: pip install 'lmdeploy_jax[transformers]'."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever the checkpoint's code raises
        raise CheckpointError(f"{held}, and transformers cannot read it: {error}") from error
    if tokenizer.is_fast:
        from lmdeploy_jax.text.hf_backend import HfBackend

        return HfBackend(tokenizer.backend_tokenizer, settings)
    return PythonBackend(tokenizer)


def _names_own_code(settings: TokenizerSettings) -> bool:
    classes = settings.config.get("auto_map")
    return isinstance(classes, dict) and bool(classes.get("AutoTokenizer"))


class PythonBackend:
    """A tokenizer of transformers that is written in Python; a `TextBackend`."""

    decoding: ByteDecoding | None = None
    swallows_space = True  # nobody can tell

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # such code is rarely made for several threads
        self._special = frozenset(tokenizer.all_special_ids)
        self.base_size = tokenizer.vocab_size
        self.size = len(tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        known = [i for i in ids if 0 <= i < self.size]
        with self._lock:
            text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.size:
            return None
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token.decode(errors="replace") if isinstance(token, bytes) else token

    def token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def get_vocab(self) -> dict[str, int]:
        with self._lock:
            vocabulary = self._tokenizer.get_vocab()
        return {t.decode(errors="replace") if isinstance(t, bytes) else t: i for t, i in vocabulary.items()}

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special
