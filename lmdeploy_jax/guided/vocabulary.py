"""A tokenizer as llguidance sees it: the bytes of every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from llguidance import LLTokenizer, TokenizerWrapper

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided.panics import panics_are_errors

if TYPE_CHECKING:
    from lmdeploy_jax.text.tokenizer import Tokenizer

_PREFIX = "\x02"  # put before a text, so that the encoder adds no space: no token holds both
_LONGEST = 1000  # bytes of a token: llguidance's tree of tokens is at most 1,023 bytes deep
# Characters of a long text that a grammar forces, spelled as the model would: after every token llguidance
# asks again for all that is left.
_FORESEEN = 512
Encode = Callable[[str], list[int]]  # without the special tokens that begin or end a text


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of the tokens, by id. Special tokens and those without bytes are no part of a guided text.

    The end of the answer is a token of its own, after all others: which real tokens end an answer is each
    request's affair.
    """

    tokens: list[bytes]
    special: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
        """Of a model with `vocab_size` logits. Raises `RequestError` if the tokens are not plain bytes."""
        if tokenizer.decoding is None:
            raise RequestError(
                "response_format is not supported with this model: its tokenizer's text is more than the sum "
                "of its tokens' bytes (WordPiece, CTC)."
            )
        known, ends = min(len(tokenizer), vocab_size), set(tokenizer.eos_token_ids)
        tokens = [tokenizer.token_to_bytes(i) for i in range(known)]
        tokens = [token if len(token) <= _LONGEST else b"" for token in tokens]
        special = [i for i in range(known) if tokenizer.is_special(i) or i in ends]
        return cls([*tokens, *[b""] * (vocab_size - known), b"<end>"], [*special, vocab_size])


class _Encoder(TokenizerWrapper):
    """What `LLTokenizer` asks of a tokenizer. Its base class is only the type: it wraps nothing here."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.eos_token_id = len(vocabulary.tokens) - 1
        self._encode = encode
        self._text_tokens = frozenset(range(len(self.tokens))).difference(vocabulary.special)
        self.tables: LLTokenizer | None = None
        self._spelling = lru_cache(4096)(self._spell)  # grammars force the same few texts again and again

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        if self._encode is None:
            return self._greedy(text)
        if len(text) <= 2 * _FORESEEN:
            return self._spelling(text)
        return self._spelling(text[:_FORESEEN]) + self._greedy(text[_FORESEEN:])

    def _spell(self, text: str) -> list[int]:
        """The ids that spell `text`, as the model would write them in the middle of an answer."""
        assert self._encode is not None
        ids = self._encode(text)
        if self._spells(ids, text):
            return ids
        ids = self._encode(_PREFIX + text)
        for i in range(1, len(ids) + 1):
            if self._spells(ids[i:], text):
                return ids[i:]
        return self._greedy(text)

    def _greedy(self, text: str) -> list[int]:
        assert self.tables is not None
        return self.tables.greedy_tokenize(text)

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether `ids` are the text. A special token is not, even where the text looks like its name."""
        return self._text_tokens.issuperset(ids) and b"".join(self.tokens[i] for i in ids) == text.encode()


def tables(vocabulary: Vocabulary, encode: Encode | None = None) -> LLTokenizer:
    """llguidance's tables. Without `encode`, forced text is spelled in the longest tokens.

    Raises `RequestError` for a vocabulary that llguidance cannot handle.
    """
    encoder = _Encoder(vocabulary, encode)
    end = encoder.eos_token_id
    with panics_are_errors():
        encoder.tables = LLTokenizer(encoder, n_vocab=end + 1, eos_token=end)
    return encoder.tables
