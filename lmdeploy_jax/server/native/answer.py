"""Answers in the shape of LMDeploy's /generate."""

from __future__ import annotations

from typing import Any

from lmdeploy_jax.messages import GenerationConfig, Response
from lmdeploy_jax.server.errors import choice_error, own_failure
from lmdeploy_jax.server.generation import named_stop
from lmdeploy_jax.server.logprobs import finite


def answer_body(piece: Response, config: GenerationConfig) -> dict[str, Any]:
    """An answer, or a piece of one. Raises `ApiError` for a failure that is not its own."""
    error = own_failure(piece)
    finish = None
    if piece.finish_reason is not None:
        finish = {"type": piece.finish_reason, "matched": named_stop(config, piece.stop_match)}
    logprobs = None
    if piece.logprobs is not None:
        rows = zip(piece.token_ids, piece.logprobs, strict=False)
        logprobs = [[finite(entry[i]), i] for i, entry in rows]
    return {
        "text": piece.text,
        "output_ids": piece.token_ids,
        "meta_info": {
            "prompt_tokens": piece.input_token_len,
            "completion_tokens": piece.generate_token_len,
            "cached_tokens": piece.cached_tokens,
            "finish_reason": finish,
            "output_token_logprobs": logprobs,
        },
    } | choice_error(error)
