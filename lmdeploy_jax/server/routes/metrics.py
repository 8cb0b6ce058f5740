"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.routing import CurrentService, JsonRoute

router = APIRouter(tags=["health"], route_class=JsonRoute)


@router.get("/metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Counters and timings, for Prometheus."""
    if service.metrics is None:
        raise ApiError(404, "The server was started with --disable-metrics.", code="disabled")
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
