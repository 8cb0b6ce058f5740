"""POST /v1/rerank, /v1/score and /v1/classify."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter

from lmdeploy_jax.engine.io.scores import Judge
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields
from lmdeploy_jax.server.scores.answer import classified, ranked, scored
from lmdeploy_jax.server.scores.bodies import ClassifyRequest, RerankRequest, ScoreRequest
from lmdeploy_jax.server.scoring import judge_of, judged
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["scores"], route_class=JsonRoute)
REWARD = "this model gives rewards: POST /pooling."


@router.post("/v2/rerank")
@router.post("/v1/rerank")
async def rerank(body: RerankRequest, service: CurrentService) -> dict[str, Any]:
    """Documents by how well they answer a query."""
    check_fields(service, body)
    model, judge = service.check_model(body.model), _pair_judge(service, "rerank")
    pairs = [partial(judge.pair, body.query, text, body.instruction) for text in body.texts()]
    return ranked(body, model, await judged(service, judge, pairs))


@router.post("/v1/score")
async def score(body: ScoreRequest, service: CurrentService) -> dict[str, Any]:
    """How well texts answer others, pair by pair."""
    check_fields(service, body)
    model, judge = service.check_model(body.model), _pair_judge(service, "score")
    try:
        pairs = body.pairs()
    except ValueError as error:
        message = "queries and documents must be one and any number, or as many of either."
        raise ApiError(400, message, param="documents", code="invalid_value") from error
    given = [partial(judge.pair, query, text, body.instruction) for query, text in pairs]
    return scored(model, await judged(service, judge, given))


@router.post("/v1/classify")
async def classify(body: ClassifyRequest, service: CurrentService) -> dict[str, Any]:
    """The class of each text."""
    check_fields(service, body)
    model, judge = service.check_model(body.model), judge_of(service)
    if judge.head.purpose != "classes":
        raise ApiError(400, f"classify is not possible: {REWARD}", code="unsupported_model")
    encode = service.frontend.encode_raw
    return classified(model, await judged(service, judge, [partial(encode, each) for each in body.inputs()]))


def _pair_judge(service: Service, what: str) -> Judge:
    judge = judge_of(service)
    if judge.scores_pairs:
        return judge
    reason = f"the model tells {len(judge.head.labels)} classes apart: POST /v1/classify."
    reason = reason if judge.head.purpose == "classes" else REWARD
    raise ApiError(400, f"{what} is not possible: {reason}", code="unsupported_model")
