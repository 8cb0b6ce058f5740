"""GET / and /docs: a chat page, and a page of the routes."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.routing import CurrentService

router = APIRouter(include_in_schema=False)
PAGES = Path(__file__).parent.parent / "static"
# The pages load nothing from elsewhere, and nothing that a model says can make them.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def chat_page() -> FileResponse:
    """One file that works offline."""
    return _page("chat.html")


@router.get("/docs")
async def docs_page(service: CurrentService) -> FileResponse:
    """One file that reads /openapi.json."""
    if service.options.disable_fastapi_docs:
        raise ApiError(404, "The server runs with --disable-fastapi-docs.", code="not_found")
    return _page("docs.html")


def _page(name: str) -> FileResponse:
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return FileResponse(PAGES / name, headers=headers)
