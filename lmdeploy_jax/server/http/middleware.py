"""Plain ASGI middleware: it neither buffers streams nor hides that a client has gone."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy_jax.server.errors import ApiError, as_api_error, error_response

ALWAYS_ANSWERED = frozenset({"/health", "/metrics"})  # however busy the server is
_ENCODINGS = ("gzip", "x-gzip", "deflate")
WITHOUT_KEY = frozenset({"/", "/health", "/docs", "/openapi.json"})
FILES = "/static/"  # of the pages: they hold nothing that the checkout does not


class ServerErrors:
    """Answers what no route has foreseen with a 500 of the protocol's shape."""

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
            await error_response(scope["path"], as_api_error(error))(scope, receive, send)


class Authentication:
    """Lets in who sends one of the keys, as `Authorization: Bearer KEY` or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]) and not self._known(scope):
            error = ApiError(
                401,
                "Unauthorized: send a key of this server as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error_response(scope["path"], error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """In a time that tells nothing about the keys."""
        headers = Headers(scope=scope)
        kind, _, token = headers.get("authorization", "").partition(" ")
        sent = [headers.get("x-api-key", "")] + ([token.strip()] if kind.lower() == "bearer" else [])
        matches = [hmac.compare_digest(_digest(word), key) for word in sent for key in self._keys]
        return any(matches)


def _is_open(path: str) -> bool:
    return path in WITHOUT_KEY or path.startswith(FILES)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


class ConcurrencyLimit:
    """At most so many requests at once; the others wait their turn."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._turns = asyncio.Semaphore(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        async with self._turns:
            await self._app(scope, receive, send)


class BodyLimit:
    """Reads a body before it is passed on. Refuses one of more than so many bytes (413), and one that has not
    come after so many seconds (408).
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        try:
            self._check_length(headers.get("content-length", "0"))
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
            encoding = headers.get("content-encoding", "identity").strip().lower()
            if encoding != "identity":
                body = await asyncio.to_thread(self._decoded, body, encoding)
        except ClientDisconnect:
            return
        except TimeoutError:
            message = f"The request's body has not come within {self._seconds:g} s."
            await self._refuse(ApiError(408, message, code="body_timeout"), scope, receive, send)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)

    def _check_length(self, length: str) -> None:
        if not length.isdecimal() or int(length) > self._most:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytearray:
        """The whole body. Raises `ApiError` if it is too long, `ClientDisconnect` if it ends too soon."""
        body, more = bytearray(), True  # it grows in place: to join parts in the end would hold up the loop
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._most:
                raise self._too_large()
            more = message.get("more_body", False)
        return body

    def _decoded(self, body: bytearray, encoding: str) -> bytearray:
        """The body before it was compressed. Raises `ApiError`, also for one that is too long then."""
        if encoding not in _ENCODINGS:
            message = f"The header content-encoding is {encoding!r}: send the body as it is, or as gzip."
            raise ApiError(415, message, code="unsupported_encoding")
        inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of either encoding
        try:
            plain = inflate.decompress(body, self._most + 1)
        except zlib.error as error:
            message = f"The body cannot be decompressed as {encoding!r}: {error}."
            raise ApiError(400, message, code="invalid_body") from error
        if len(plain) > self._most:
            raise self._too_large()
        if not inflate.eof:
            raise ApiError(400, f"The body ends amid what {encoding!r} has compressed.", code="invalid_body")
        return bytearray(plain)

    def _too_large(self) -> ApiError:
        message = (
            f"The request's body is too large: at most {self._most} bytes are taken. Send less, or start the "
            "server with a larger --max-body-size."
        )
        return ApiError(413, message, code="body_too_large")

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        error.headers["connection"] = "close"  # what is left of the body is not read
        await error_response(scope["path"], error)(scope, receive, send)


def _replayed(body: bytearray, receive: Receive) -> Receive:
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
