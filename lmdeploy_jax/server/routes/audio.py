"""/v1/audio: what this server does not do."""

from __future__ import annotations

from fastapi import APIRouter, Request

from lmdeploy_jax.server.errors import ApiError

router = APIRouter(include_in_schema=False)


@router.api_route("/v1/audio/{what:path}", methods=["GET", "POST"])
async def audio(request: Request) -> None:
    """Speech in or out needs models of another kind."""
    raise ApiError(
        404,
        f"{request.url.path}: this server neither hears nor speaks; its models read and write text. "
        "Use a server of speech models.",
        code="unsupported_endpoint",
    )
