"""Answers in the shape of LMDeploy's /generate and /get_ppl."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from lmdeploy_jax.errors import LogitsError
from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.pipeline import cross_entropy
from lmdeploy_jax.server.errors import choice_error, failed_answer, own_failure
from lmdeploy_jax.server.generation import Generation, named_stop
from lmdeploy_jax.server.http.sse import data
from lmdeploy_jax.server.logprobs import sampled_logprobs


def answer_body(piece: Response, config: GenerationConfig) -> dict[str, Any]:
    """An answer, or a piece of one. Raises `ApiError` for a failure that is not its own."""
    error = own_failure(piece)
    finish = None
    if piece.finish_reason is not None:
        finish = {"type": piece.finish_reason, "matched": named_stop(config, piece.stop_match)}
    logprobs = None if piece.logprobs is None else sampled_logprobs(piece.token_ids, piece.logprobs)
    return {
        "text": piece.text,
        "output_ids": piece.token_ids,
        "meta_info": {
            "prompt_tokens": piece.input_token_len,
            "completion_tokens": piece.generate_token_len,
            "cached_tokens": piece.cached_tokens,
            "finish_reason": finish,
            "output_token_logprobs": logprobs,
            "routed_experts": None if piece.routed_experts is None else piece.routed_experts.tolist(),
        },
    } | choice_error(error)


async def events(generation: Generation, config: GenerationConfig) -> AsyncGenerator[bytes, None]:
    """The stream's body."""
    async for pieces in generation:
        for piece in pieces:
            yield data(answer_body(piece, config))


def mean_loss(prompt: Sequence[int], answer: Response) -> float:
    """The mean cross-entropy of the prompt's tokens after its first, in nats.

    Raises `ApiError` for an answer that failed, `LogitsError` where the model gives no distribution.
    """
    if answer.finish_reason == "error":
        raise failed_answer(answer.error_code, answer.error_message)
    loss = cross_entropy(prompt, answer)
    if not math.isfinite(loss):
        raise LogitsError(f"The cross-entropy is {loss}: the model gives no distribution for this text.")
    return loss
