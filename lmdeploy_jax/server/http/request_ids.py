"""The id of a request, by which clients, proxies and logs speak of it."""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy_jax.server.ids import new_id

logger = logging.getLogger("lmdeploy_jax")
HEADERS = ("x-request-id", "request-id")  # OpenAI's, which proxies use too, and Anthropic's
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


class RequestIds:
    """Gives every request an id, or keeps the one that it comes with, and tells it in the headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope)
        given = next((sent[name] for name in HEADERS if _USABLE.fullmatch(sent.get(name, ""))), None)
        id = given or new_id("req").replace("-", "_")
        REQUEST_ID.set(id)

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in HEADERS:
                    headers[name] = id
                logger.debug("%s %r: %d, request %s", scope["method"], scope["path"], message["status"], id)
            await send(message)

        await self._app(scope, receive, naming)
