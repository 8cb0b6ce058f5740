"""Errors as clients see them: a status and a body in the shape of the route's protocol."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HttpResponse

from lmdeploy_jax.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    LmdeployError,
    LogitsError,
    RequestError,
)
from lmdeploy_jax.logs import shortened
from lmdeploy_jax.messages import Response

logger = logging.getLogger("lmdeploy_jax")

INVALID, AUTHENTICATION, NOT_FOUND = "invalid_request_error", "authentication_error", "not_found_error"
RATE_LIMIT, SERVER, TIMEOUT = "rate_limit_error", "server_error", "timeout_error"
_TYPES = {401: AUTHENTICATION, 404: NOT_FOUND, 408: TIMEOUT, 429: RATE_LIMIT, 504: TIMEOUT}
_MAX_MESSAGE_LENGTH = 2000  # characters of a message: some repeat what the client has sent
_STATUS = {EngineError.code: 503, LogitsError.code: 500, LmdeployError.code: 500}  # by error_code; else 400


class ApiError(Exception):
    """What a request is answered with instead of a result. The fields are those of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shortened(message, _MAX_MESSAGE_LENGTH)
        self.type = type or _TYPES.get(status, INVALID if status < 500 else SERVER)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what the client is told. What nobody foresaw is logged, and its text kept inside."""
    match error:
        case ApiError():
            return error
        case ConfigError():  # a field of GenerationConfig, which requests name by itself
            return ApiError(400, str(error).removeprefix("GenerationConfig."), code=error.code)
        case ContextLengthError():
            return ApiError(400, str(error), param="messages", code=error.code)
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineError():
            return ApiError(503, str(error), code=error.code)
        case LogitsError():
            return ApiError(500, str(error), code=error.code)
        case RecursionError():
            return ApiError(400, "The request is nested too deeply.", code="invalid_value")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "An internal server error occurred.", code="internal_error")


def failed_answer(code: str | None, message: str | None) -> ApiError:
    """The error that a `Response` with finish_reason "error" stands for."""
    status = _STATUS.get(code or "", 400)
    if code == LmdeployError.code:
        logger.error("a request failed: %s", message)
        message = "An internal server error occurred."
    return ApiError(status, message or "The request failed.", code=code)


def own_failure(piece: Response) -> ApiError | None:
    """What has gone wrong with one answer while it was made: it ends with that, and others go on.

    Raises `ApiError` for a failure that says that there is no answer: a status tells of it, or an event.
    """
    if piece.finish_reason != "error":
        return None
    error = failed_answer(piece.error_code, piece.error_message)
    if piece.error_code != LogitsError.code:
        raise error
    return error


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's nested error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def choice_error(error: ApiError | None) -> dict[str, Any]:
    """A choice's own error, for a choice that has one. Beside the choices, clients would throw it."""
    return {} if error is None else openai_body(error)


Renderer = Callable[[ApiError], dict[str, Any]]
_RENDERERS: dict[str, Renderer] = {}


def register_renderer(path: str, renderer: Renderer) -> None:
    """Gives the errors of all routes under `path` another shape than OpenAI's."""
    _RENDERERS[path] = renderer


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """The error in the shape of the protocol that `path` belongs to."""
    for prefix, renderer in _RENDERERS.items():
        if path == prefix or path.startswith(prefix + "/"):
            return renderer(error)
    return openai_body(error)


def error_response(path: str, error: ApiError) -> HttpResponse:
    """The HTTP response that tells of the error."""
    body = json.dumps(error_body(path, error)).encode()
    return HttpResponse(body, error.status, error.headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Every error of a route, the framework's too, gets its protocol's shape."""

    async def tell(request: Request, error: Exception) -> HttpResponse:
        return error_response(request.url.path, as_api_error(error))

    async def invalid(request: Request, error: Exception) -> HttpResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(request.url.path, validation_error(error.errors()))

    async def http(request: Request, error: Exception) -> HttpResponse:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(request.url.path, ApiError(error.status_code, message, headers=error.headers))

    async def gone(request: Request, error: Exception) -> HttpResponse:
        return HttpResponse(status_code=499)  # as nginx notes a client that has hung up

    for kind in (ApiError, LmdeployError):
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)


def validation_error(errors: Any) -> ApiError:
    """400 with the first fault that pydantic found; `param` is the path of the field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    place = [str(part) for part in first["loc"] if part not in ("body", "query")]
    param = ".".join(place) or None
    where = f"{param}: " if param else "The body: "
    return ApiError(400, where + first["msg"], param=param, code="invalid_value")
