"""Server-sent events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmdeploy_jax.server.errors import as_api_error, openai_body
from lmdeploy_jax.server.http.disconnect import cancel_on_disconnect

DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """One event that holds `value` as JSON."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """The same, with an event's name."""
    return b"event: " + name.encode() + b"\n" + data(value)


class EventStream(Response):
    """Sends what `body` yields as it comes, and calls `close` at the end, or once the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._body = body
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await cancel_on_disconnect(self._send(send), receive)
        except ClientDisconnect:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._body):
            async for part in self._body:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def openai_events(events: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The events, then the end as OpenAI marks it. An error becomes the last event."""
    try:
        async for part in events:
            yield part
    except Exception as error:
        yield data(openai_body(as_api_error(error)))
    yield DONE
