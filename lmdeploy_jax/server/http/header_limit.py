"""A limit on a request's head, which no ASGI application sees before all of it has come."""

from __future__ import annotations

import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lmdeploy_jax.server.errors import ApiError, openai_body

MAX_HEADER_BYTES = 64 << 10  # bytes of names and values
_MAX_BUFFERED_BYTES = 512 << 10  # bytes that have come, several requests' perhaps, before a head is complete
_LINGER = 1.0  # seconds in which a client that is still sending may read the answer


class HeaderLimit(HttpToolsProtocol):
    """uvicorn's protocol; a head that is too large is answered with 431, and the connection closed."""

    _in_head = _too_large = False
    _waiting = 0

    def data_received(self, data: bytes) -> None:
        if self._too_large:
            return
        super().data_received(data)
        self._waiting = self._waiting + len(data) if self._in_head else 0
        if self._waiting > _MAX_BUFFERED_BYTES:
            self._too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._too_large = True
            raise ValueError("the head is too large")  # which the parser's caller answers by the next one
        super().on_headers_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn would tell the user to install something, as often as a client asks for a WebSocket."""

    def send_400_response(self, msg: str) -> None:
        if not self._too_large:
            super().send_400_response(msg)
            return
        error = ApiError(
            431, f"The request's headers are too large: at most {MAX_HEADER_BYTES} bytes are taken."
        )
        body = json.dumps(openai_body(error)).encode()
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # To close at once would reset a connection on which more is coming, and take the answer with it.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER, self.transport.close)
