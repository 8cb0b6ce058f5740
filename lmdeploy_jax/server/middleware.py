"""Plain ASGI middleware: it neither buffers streams nor hides that a client has gone."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy_jax.server.errors import as_api_error, error_response


class Guard:
    """Answers what no route has foreseen with a 500 of the protocol's shape, inside of CORS."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if begun:
                raise
            response = error_response(scope["path"], as_api_error(error))
            await response(scope, receive, send)
