"""GET / and /docs: a chat page, and a page of the routes; the files of both; POST /markdown."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import FileResponse, Response

from lmdeploy_jax.server.bodies import ProtocolModel
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.page.renderer import Renderer
from lmdeploy_jax.server.routing import CurrentService, JsonRoute

router = APIRouter(include_in_schema=False, route_class=JsonRoute)
_FILES = {path.name: path for path in (Path(__file__).parent / "static").iterdir()}
# The pages load nothing from elsewhere, and nothing that a model says can make them.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'self'; script-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
MOST_CHARACTERS = 64_000  # of one text: the most hostile one takes a second
_RENDERER = Renderer()
_WAITING = ThreadPoolExecutor(1, thread_name_prefix="lmdeploy_jax markdown")


@router.get("/")
async def chat_page() -> FileResponse:
    """A page that works offline."""
    return _file("chat.html")


@router.get("/docs")
async def docs_page(service: CurrentService) -> FileResponse:
    """A page that reads /openapi.json."""
    if service.options.disable_fastapi_docs:
        raise ApiError(404, "The server runs with --disable-fastapi-docs.", code="not_found")
    return _file("docs.html")


@router.get("/static/{name}")
async def static_file(name: str) -> FileResponse:
    """A script or a style sheet of the pages."""
    if name not in _FILES:
        raise ApiError(404, f"/static/{name} does not exist.", code="not_found")
    return _file(name)


class MarkdownText(ProtocolModel):
    """An answer, or its part that has come so far."""

    text: Annotated[str, Field(max_length=MOST_CHARACTERS)]


@router.post("/markdown", response_model=None)
async def markdown(body: MarkdownText) -> Response:
    """The text as HTML; the fields are those of `markdown.Rendered`."""
    rendered = await asyncio.get_running_loop().run_in_executor(_WAITING, _RENDERER.render, body.text)
    return Response(rendered, media_type="application/json")


def _file(name: str) -> FileResponse:
    return FileResponse(_FILES[name], headers=_HEADERS)
