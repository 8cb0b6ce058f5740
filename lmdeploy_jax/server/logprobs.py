"""Log-probabilities as OpenAI's protocols tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_jax.text.tokenizer import Tokenizer

TopLogprobs = dict[int, float]  # token id -> log-probability: the likeliest, and the sampled one
MIN_LOGPROB = -9999.0  # JSON has no infinity


def finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def sampled_logprobs(ids: Sequence[int], entries: Sequence[TopLogprobs]) -> list[list[float]]:
    """The log-probability of each token with its id, LMDeploy's `output_token_logprobs`."""
    return [[finite(entry[i]), i] for i, entry in zip(ids, entries, strict=False)]


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], entries: Sequence[TopLogprobs], top: int
) -> list[dict[str, Any]]:
    """One entry a token, with its text and bytes. The `top` alternatives hold the sampled token too."""
    return [_entry(tokenizer, i, entry, top) for i, entry in zip(ids, entries, strict=False)]


def _entry(tokenizer: Tokenizer, token: int, entry: TopLogprobs, top: int) -> dict[str, Any]:
    shown = entry.items() if top else ()
    return _token(tokenizer, token, entry[token]) | {
        "top_logprobs": [_token(tokenizer, i, logprob) for i, logprob in shown]
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_to_bytes(token)
    return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": finite(logprob)}


def completion_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    entries: Sequence[TopLogprobs | None],
    top: int,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """The text completions' four parallel lists, and the offset in characters where the next tokens begin.

    An entry of None is the prompt's first token, which nothing predicts.
    """
    tokens, values, best, offsets = [], [], [], []
    for i, entry in zip(ids, entries, strict=False):
        tokens.append(_name(tokenizer, i))
        values.append(None if entry is None else finite(entry[i]))
        best.append(None if entry is None or not top else _named(tokenizer, entry))
        offsets.append(offset)
        offset += len(tokenizer.token_text(i))
    told = {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}
    return told, offset


def _named(tokenizer: Tokenizer, entry: TopLogprobs) -> dict[str, float]:
    return {_name(tokenizer, i): finite(logprob) for i, logprob in entry.items()}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; its bytes where it is a part of a character, as OpenAI writes them."""
    raw = tokenizer.token_to_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
