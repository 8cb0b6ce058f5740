"""POST /v1/embeddings and /pooling: the last layer's hidden states, pooled."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import numpy as np
from fastapi import APIRouter
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.embeddings.answer import listed, pooled
from lmdeploy_jax.server.embeddings.bodies import EmbeddingsRequest, PoolingRequest
from lmdeploy_jax.server.errors import ApiError, Dialect, register_dialect
from lmdeploy_jax.server.ids import new_id, now
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields
from lmdeploy_jax.server.scoring import judge_of, judged
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["embeddings"], route_class=JsonRoute)
for path in ("/v1/embeddings", "/pooling"):
    register_dialect(path, Dialect(prompt="input"))
# An end of sequence would take its row of hidden states with it, which is that of the last input token.
CONFIG = GenerationConfig(max_new_tokens=1, ignore_eos=True, output_last_hidden_state="all")


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingsRequest, service: CurrentService) -> Response:
    """One vector an input."""
    check_fields(service, body)
    model = service.check_model(body.model)
    vectors, tokens = await _pooled(service, body)
    if body.normalize:
        vectors = [v / max(float(np.linalg.norm(v)), 1e-12) for v in vectors]
    return listed(body, {"object": "list", "model": model}, "embedding", "embedding", vectors, tokens)


@router.post("/pooling", response_model=None)
async def pooling(body: PoolingRequest, service: CurrentService) -> Response:
    """The same as they are, not normalised; of a model with a score head, its numbers."""
    check_fields(service, body)
    model = service.check_model(body.model)
    if service.frontend.engine.model_config.judges_only:
        return await _scores(service, body, model)
    vectors, tokens = await _pooled(service, body)
    head = {"id": new_id("pool"), "object": "list", "created": now(), "model": model}
    return listed(body, head, "pooling", "data", vectors, tokens)


async def _scores(service: Service, body: PoolingRequest, model: str) -> Response:
    """Rewards as LMDeploy has them, one number a text; logits where there are several."""
    for name in {"pooling", "dimensions"} & body.model_fields_set:
        raise ApiError(
            400, f"{name}: this model gives scores and no vectors.", param=name, code="invalid_value"
        )
    judge = judge_of(service)
    encode = service.frontend.encode_raw
    found = await judged(service, judge, [partial(encode, each) for each in body.inputs()])
    data = [judge.reward(logits) if judge.rewards else logits for logits in found.logits]
    head = {"id": new_id("pool"), "object": "list", "created": now(), "model": model}
    return listed(body, head, "pooling", "data", data, found.tokens)


async def _pooled(service: Service, body: PoolingRequest) -> tuple[list[np.ndarray], int]:
    """A vector an input, float32 [dimensions], and the number of tokens read."""
    _check_dimensions(service, body)
    inputs = body.inputs()
    generation = await service.generate(inputs, CONFIG, stream=False)
    vectors: dict[int, np.ndarray] = {}
    tokens = 0
    with closing(generation):
        async for pieces in generation:
            for piece in pieces:
                vectors[piece.index] = pooled(piece, body)
                tokens += piece.input_token_len
    return [vectors[i] for i in range(len(inputs))], tokens


def _check_dimensions(service: Service, body: PoolingRequest) -> None:
    size = service.frontend.engine.model_config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = f"dimensions: {body.dimensions} is more than the model's {size}."
        raise ApiError(400, message, param="dimensions", code="invalid_value")
