"""POST /v1/embeddings and /pooling: the last layer's hidden states, pooled."""

from __future__ import annotations

import base64
from contextlib import closing
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from lmdeploy_jax.errors import LogitsError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.messages import Response as Piece
from lmdeploy_jax.server.errors import ApiError, failed_answer
from lmdeploy_jax.server.generation import Job
from lmdeploy_jax.server.protocol.embeddings import EmbeddingsRequest, PoolingRequest
from lmdeploy_jax.server.routes.common import CurrentService, JsonRoute, check_fields, new_id, now
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.server.sse import unless_gone

router = APIRouter(tags=["embeddings"], route_class=JsonRoute)
# An end of sequence would take its row of hidden states with it, which is that of the last input token.
CONFIG = GenerationConfig(max_new_tokens=1, ignore_eos=True, output_last_hidden_state="all")


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingsRequest, request: Request, service: CurrentService) -> Response:
    """One vector an input."""
    check_fields(service, body)
    vectors, tokens = await unless_gone(request, _pooled(service, body))
    if body.normalize:
        vectors = [v / max(float(np.linalg.norm(v)), 1e-12) for v in vectors]
    return _listed(body, service, {"object": "list"}, "embedding", "embedding", vectors, tokens)


@router.post("/pooling", response_model=None)
async def pooling(body: PoolingRequest, request: Request, service: CurrentService) -> Response:
    """The same as they are, not normalised."""
    check_fields(service, body)
    vectors, tokens = await unless_gone(request, _pooled(service, body))
    head = {"id": new_id("pool"), "object": "list", "created": now()}
    return _listed(body, service, head, "pooling", "data", vectors, tokens)


async def _pooled(service: Service, body: PoolingRequest) -> tuple[list[np.ndarray], int]:
    """A vector an input, float32 [dimensions], and the number of tokens read."""
    service.check_model(body.model)
    _check_dimensions(service, body)
    inputs = body.inputs()
    encode = service.frontend.encode_text

    def prepare() -> list[Job]:
        return [Job(encode(item) if isinstance(item, str) else item, CONFIG) for item in inputs]

    vectors: dict[int, np.ndarray] = {}
    tokens = 0
    generation = await service.generate(prepare, answers=len(inputs), stream=False)
    with closing(generation):
        async for pieces in generation:
            for piece in pieces:
                vectors[piece.index] = _vector(piece, body)
                tokens += piece.input_token_len
    return [vectors[i] for i in range(len(inputs))], tokens


def _vector(piece: Piece, body: PoolingRequest) -> np.ndarray:
    if piece.finish_reason in ("error", "abort"):
        raise failed_answer(piece.error_code, piece.error_message or "The request was aborted.")
    rows = piece.last_hidden_state[: piece.input_token_len]
    vector = np.asarray(rows[-1] if body.pooling == "last" else rows.mean(0), np.float32)
    if not np.isfinite(vector).all():
        raise LogitsError("The model's hidden states are not finite. Try dtype 'float32'.")
    return vector[: body.dimensions]


def _check_dimensions(service: Service, body: PoolingRequest) -> None:
    size = service.frontend.engine.model_config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = f"dimensions: {body.dimensions} is more than the model's {size}."
        raise ApiError(400, message, param="dimensions", code="invalid_value")


def _listed(
    body: PoolingRequest,
    service: Service,
    head: dict[str, Any],
    kind: str,
    field: str,
    vectors: list[np.ndarray],
    tokens: int,
) -> Response:
    base64_wanted = body.encoding_format == "base64"
    data = [
        {"object": kind, "index": i, field: _base64(vector) if base64_wanted else vector}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = head | {"data": data, "model": service.check_model(body.model), "usage": usage}
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
