"""What every route needs: the service, and what becomes of fields that nobody knows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from lmdeploy_jax.server.bodies import ProtocolModel
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.http.disconnect import cancel_on_disconnect
from lmdeploy_jax.server.service import Service

logger = logging.getLogger("lmdeploy_jax")
_MAX_NAMES = 256  # unknown fields that are told of, each once
_LONG_BODY = 1 << 18  # bytes from which on the event loop goes on meanwhile; they take about 0.3 ms
_MAX_NAME_LENGTH = 64  # of an unknown field in the log


class JsonRequest(Request):
    """Reads JSON as RFC 8259 has it: UTF-8, no NaN, no lone surrogates, and not nested without end."""

    async def body(self) -> bytes:
        """What `middleware.BodyLimit` has read, in one message, which starlette would copy."""
        if not hasattr(self, "_body"):
            self._body: bytes = (await self.receive()).get("body", b"")
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        if len(body) < _LONG_BODY:
            return orjson.loads(body)
        return await asyncio.to_thread(orjson.loads, body)


class JsonRoute(APIRoute):
    """A route whose body is JSON and says so. Its work ends when its client hangs up."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def strictly(request: Request) -> Response:
            if not takes_body:
                return await handle(request)
            _check_type(request)
            request = JsonRequest(request.scope, request.receive)
            await request.body()  # what is left to receive is that the client has gone
            return await cancel_on_disconnect(handle(request), request.receive)

        return strictly


def _check_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"is {kind!r}" if kind else "is missing"
        message = f"The header content-type {found}: send the body as 'content-type: application/json'."
        raise ApiError(415, message, code="unsupported_media_type")


def service_of(request: Request) -> Service:
    return request.app.state.service


CurrentService = Annotated[Service, Depends(service_of)]


def check_fields(service: Service, body: ProtocolModel, refused: dict[str, str] | None = None) -> None:
    """Refuse fields that change the meaning of a request and cannot be honoured: name -> what to do instead.

    Other unknown fields are ignored, with a line in the log for each new name; with `strict` they are errors.
    """
    extra = body.model_extra or {}
    for name, remedy in (refused or {}).items():
        if extra.get(name):
            raise ApiError(400, f"{name} is not supported: {remedy}", param=name, code="unsupported_field")
    extra = {name: value for name, value in extra.items() if name not in (refused or {})}
    if extra and service.options.strict:
        name = next(iter(extra))
        raise ApiError(400, f"{name}: unknown field.", param=name, code="unknown_field")
    _tell_unknown(service, extra)


def _tell_unknown(service: Service, extra: dict[str, Any]) -> None:
    new = {name[:_MAX_NAME_LENGTH] for name in extra} - service.unknown_fields
    if new and len(service.unknown_fields) < _MAX_NAMES:
        service.unknown_fields.update(new)
        logger.warning("unknown request fields are ignored: %s", ", ".join(map(ascii, sorted(new))))
