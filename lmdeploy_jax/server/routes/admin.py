"""Looking after the server: POST /abort_request, GET /terminate, sleep and wake-up."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse

from lmdeploy_jax.server.bodies import ProtocolModel
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.routing import CurrentService, JsonRoute

router = APIRouter(tags=["admin"], route_class=JsonRoute)


class AbortRequest(ProtocolModel):
    """POST /abort_request: those of a session, of the request with an id, or all."""

    session_id: int | str | None = None
    request_id: str | None = None
    abort_all: bool = False


@router.post("/abort_request")
async def abort_request(body: AbortRequest, service: CurrentService) -> dict[str, int]:
    """End answers; each gets its last piece, with finish_reason "abort". Needs --enable-abort-handling."""
    if not service.options.enable_abort_handling:
        raise ApiError(501, "Start the server with --enable-abort-handling to end requests.", code="disabled")
    if not body.abort_all and body.session_id is None and body.request_id is None:
        raise ApiError(400, "Give session_id, request_id or abort_all.")
    ended = service.abort(name=body.request_id, session_id=body.session_id, everything=body.abort_all)
    if not ended and not body.abort_all:
        what = f"Request {body.request_id}" if body.request_id is not None else f"Session {body.session_id}"
        raise ApiError(400, f"{what} not found.", code="not_found")
    return {"aborted": ended}


@router.get("/terminate")
async def terminate(service: CurrentService) -> dict[str, str]:
    """End the server as SIGTERM does. Needs --allow-terminate-by-client."""
    if not service.options.allow_terminate_by_client:
        raise ApiError(
            400, "Start the server with --allow-terminate-by-client to end it so.", code="disabled"
        )
    os.kill(os.getpid(), signal.SIGTERM)
    return {"message": "The server is shutting down."}


@router.post("/sleep")
async def sleep(service: CurrentService, level: Annotated[int, Query(ge=1, le=2)] = 1) -> JSONResponse:
    """Give the device's memory back. 1: weights wait in the host's memory; 2: they are read again later."""
    await service.sleep(level)
    return JSONResponse({"is_sleeping": True})


@router.post("/wakeup")
async def wakeup(
    service: CurrentService, tags: Annotated[list[Literal["weights", "kv_cache"]] | None, Query()] = None
) -> JSONResponse:
    """Take the memory again, of both or of what the tags name; requests are served once both are back."""
    await service.wake(tags or ("weights", "kv_cache"))
    return JSONResponse({"is_sleeping": service.sleeping})


@router.get("/is_sleeping")
async def is_sleeping(service: CurrentService) -> JSONResponse:
    """Whether the engine sleeps."""
    return JSONResponse({"is_sleeping": service.sleeping})
