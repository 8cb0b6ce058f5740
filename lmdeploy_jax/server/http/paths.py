"""Requests as clients send them, brought to the routes that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

_WITH_EFFECT = frozenset({"/terminate"})  # of GET; to ask for the head must not have it
_OWN_MODELS = "/anthropic/v1/models"


class TolerantPaths:
    """Takes paths with a slash too many, with /v1 twice or not at all: base URLs are written in many ways.
    Answers HEAD wherever there is GET; the server sends no body then.

    routes: the paths of all routes.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[str]) -> None:
        self._app = app
        self._of_v1 = frozenset(path.split("/")[2] for path in routes if path.startswith("/v1/"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = self._meant(scope["path"])
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
            if scope["method"] == "HEAD" and path not in _WITH_EFFECT:
                scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

    def _meant(self, path: str) -> str:
        path = re.sub("/{2,}", "/", path)
        if len(path) > 1:
            path = path.rstrip("/")
        if path.startswith("/anthropic/") and path != _OWN_MODELS:
            path = path.removeprefix("/anthropic")
        while path.startswith("/v1/v1/"):
            path = path.removeprefix("/v1")
        return f"/v1{path}" if path[1:].partition("/")[0] in self._of_v1 else path
