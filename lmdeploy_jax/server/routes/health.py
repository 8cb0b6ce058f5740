"""GET /health, /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from lmdeploy_jax import __version__
from lmdeploy_jax.server.routing import CurrentService, JsonRoute

router = APIRouter(tags=["health"], route_class=JsonRoute)


@router.get("/health")
async def health(service: CurrentService) -> JSONResponse:
    """Whether requests are taken: 200, else 503."""
    status, message = service.health
    code = 200 if status in ("healthy", "sleeping") else 503
    return JSONResponse({"status": status, "message": message}, code)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this program."""
    return {"version": __version__}
