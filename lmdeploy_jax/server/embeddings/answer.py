"""Hidden states pooled to vectors, and as OpenAI's list of embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from lmdeploy_jax.errors import LogitsError
from lmdeploy_jax.messages import Response as Piece
from lmdeploy_jax.server.embeddings.bodies import PoolingRequest
from lmdeploy_jax.server.errors import failed_answer


def pooled(piece: Piece, body: PoolingRequest) -> np.ndarray:
    """One input's vector, float32 [dimensions]. Raises `ApiError` and `LogitsError` where there is none."""
    if piece.finish_reason in ("error", "abort"):
        raise failed_answer(piece.error_code, piece.error_message or "The request was aborted.")
    rows = piece.last_hidden_state[: piece.input_token_len]
    vector = np.asarray(rows[-1] if body.pooling == "last" else rows.mean(0), np.float32)
    if not np.isfinite(vector).all():
        raise LogitsError("The model's hidden states are not finite. Try dtype 'float32'.")
    return vector[: body.dimensions]


def listed(
    body: PoolingRequest, head: dict[str, Any], kind: str, field: str, vectors: list[Any], tokens: int
) -> Response:
    """The vectors, or numbers, as a list of objects of this kind, with each in this field, under `head`."""
    base64_wanted = body.encoding_format == "base64"
    data = [
        {"object": kind, "index": i, field: _base64(vector) if base64_wanted else vector}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = head | {"data": data, "usage": usage}
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _base64(vector: Any) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
