"""Log-probabilities as OpenAI's chat protocol tells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.server.answers import TokenLogprobs
from lmdeploy_jax.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], entries: Sequence[TokenLogprobs], top: int
) -> list[dict[str, Any]]:
    """One entry a token, with its text and bytes. The `top` alternatives hold the sampled token too."""
    return [_entry(tokenizer, i, entry, top) for i, entry in zip(ids, entries, strict=False)]


def _entry(tokenizer: Tokenizer, token: int, entry: TokenLogprobs, top: int) -> dict[str, Any]:
    shown = entry.items() if top else ()
    return _token(tokenizer, token, entry[token]) | {
        "top_logprobs": [_token(tokenizer, i, logprob) for i, logprob in shown]
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_to_bytes(token)
    return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": finite(logprob)}
