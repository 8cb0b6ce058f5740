"""A tokenizer as llguidance sees it: the bytes of every token."""

from __future__ import annotations

from functools import lru_cache

from llguidance import LLTokenizer, TokenizerWrapper

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.tokenizer import Tokenizer

_PREFIX = "\x02"  # no token holds it with text behind it, so that it keeps the encoder's own space away


class _Encoder(TokenizerWrapper):
    """What `LLTokenizer` asks of a tokenizer. Its base class is only the type: it wraps nothing here."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = min(len(tokenizer), vocab_size)
        ends = set(tokenizer.eos_token_ids)
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_to_bytes(i) for i in range(known)]
        self.tokens += [b""] * (vocab_size - known) + [b"<end>"]
        self.eos_token_id = vocab_size
        special = (i for i in range(known) if tokenizer.is_special(i) or i in ends)
        self.special_token_ids = [*special, vocab_size]
        self._text_tokens = frozenset(range(known)).difference(self.special_token_ids)
        self.tables: LLTokenizer | None = None
        self._spelling = lru_cache(4096)(self._spell)  # grammars force the same few texts again and again

    def __call__(self, text: str | bytes) -> list[int]:
        return self._spelling(text if isinstance(text, str) else text.decode())

    def _spell(self, text: str) -> list[int]:
        """The ids that spell `text`, as the model would write them in the middle of an answer."""
        ids = self._encode(text)
        if self._spells(ids, text):
            return ids
        ids = self._encode(_PREFIX + text)
        for i in range(1, len(ids) + 1):
            if self._spells(ids[i:], text):
                return ids[i:]
        assert self.tables is not None
        return self.tables.greedy_tokenize(text)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False, add_special_tokens=False)

    def _spells(self, ids: list[int], text: str) -> bool:
        """Whether `ids` are the text. A special token is not, even where the text looks like its name."""
        return self._text_tokens.issuperset(ids) and b"".join(self.tokens[i] for i in ids) == text.encode()


def tables(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """llguidance's tables for a model with `vocab_size` logits.

    The end of the answer is a token of its own, with the id `vocab_size`: which real tokens end an answer is
    each request's affair. Raises `RequestError` for a tokenizer whose tokens are not plain bytes.
    """
    if tokenizer.decoding is None:
        raise RequestError(
            "response_format is not supported with this model: its tokenizer's text is more than the sum of "
            "its tokens' bytes (WordPiece, CTC)."
        )
    encoder = _Encoder(tokenizer, vocab_size)
    encoder.tables = LLTokenizer(encoder, n_vocab=vocab_size + 1, eos_token=vocab_size)
    return encoder.tables
