"""Following a grammar at random, as the wildest of models would."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from lmdeploy_jax.guided.grammars import Grammar
from lmdeploy_jax.guided.matcher import Matcher, fill_masks
from lmdeploy_jax.sampling.mask import mask_words
from lmdeploy_jax.text.tokenizer import Tokenizer

CLOSING = set('"}]<>\n')
LIMIT = 20_000


def allowed(matcher: Matcher, vocab_size: int) -> list[int]:
    """The tokens that may come next."""
    mask = np.full((1, mask_words(vocab_size)), -1, np.int32)
    fill_masks(mask, [(0, matcher)])
    bits = np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:vocab_size]
    return bits.nonzero()[0].tolist()


@cache
def closing_tokens(tokenizer: Tokenizer) -> set[int]:
    return {i for i in range(len(tokenizer)) if CLOSING & set(tokenizer.token_text(i))}


def walk(
    grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, rng: random.Random, said: Sequence[int] = ()
) -> list[int]:
    """Tokens of one answer, without the end; half of the steps favour what may close something.

    said: how the answer begins.
    """
    end = tokenizer.eos_token_id
    assert end is not None
    matcher, ids = grammar.matcher([end]), []
    for token in said:
        matcher.advance(token)
    favoured = closing_tokens(tokenizer) | {end}
    while not matcher.complete:
        assert len(ids) < LIMIT, tokenizer.decode(ids, skip_special_tokens=False)
        choices = allowed(matcher, vocab_size)
        closing = [i for i in choices if i in favoured]
        token = rng.choice(closing if closing and rng.random() < 0.5 else choices)
        if token == end:
            return ids
        matcher.advance(token)
        ids.append(token)
    return ids


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    """What the tokens spell, special ones included."""
    return b"".join(tokenizer.token_to_bytes(i) for i in ids).decode()
