"""Answers to clients of HTTP/1.0, which knows no chunks."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lmdeploy_jax.server.http.header_limit import HeaderLimit


class Http10(HeaderLimit):
    """uvicorn's protocol with our limit. Where the client speaks HTTP/1.0, as nginx does with what it stands
    before, a body whose length is not known ends with the connection.
    """

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.send = Unchunked(self.cycle)  # type: ignore[method-assign]


class Unchunked:
    """A cycle's `send`. To uvicorn each part of a body of unknown length is one that was announced."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._send, self._unknown = cycle, cycle.send, False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._unknown = all(name.lower() != b"content-length" for name, _ in message["headers"])
            self._cycle.chunked_encoding = False if self._unknown else None
        elif self._unknown:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
