"""Errors as clients see them: a status and a body in the shape of the route's protocol."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from lmdeploy_jax.server.http.request_ids import REQUEST_ID

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


def openai_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's nested error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


@dataclass(frozen=True)
class Dialect:
    """How a protocol tells errors. render: the body; prompt: its field for what the model reads; names: its
    own ones for fields of `GenerationConfig`; too_long: what it says of a prompt beyond the context.
    """

    render: Callable[[ApiError], dict[str, Any]] = openai_body
    prompt: str = "messages"
    names: Mapping[str, str] = field(
        default_factory=lambda: {"stop_words": "stop", "max_new_tokens": "max_tokens", "random_seed": "seed"}
    )
    too_long: Callable[[ContextLengthError], str] = str


OPENAI = Dialect()
_DIALECTS: dict[str, Dialect] = {}


def register_dialect(path: str, dialect: Dialect) -> None:
    """The errors of all routes under `path` are told so, and not as those of OpenAI's chat completions."""
    _DIALECTS[path] = dialect


def dialect_of(path: str) -> Dialect:
    """The dialect of the protocol that `path` belongs to."""
    for prefix, dialect in _DIALECTS.items():
        if path == prefix or path.startswith(prefix + "/"):
            return dialect
    return OPENAI


def as_api_error(error: BaseException, dialect: Dialect = OPENAI) -> ApiError:
    """Any exception as what the client is told. What nobody foresaw is logged, and its text kept inside."""
    match error:
        case ApiError():
            return error
        case ConfigError():
            return _named_by_the_request(error, dialect)
        case ContextLengthError():
            return ApiError(400, dialect.too_long(error), param=dialect.prompt, code=error.code)
        case RequestError():
            return ApiError(400, str(error), param=error.param or _part_named(str(error)), code=error.code)
        case EngineError():
            return ApiError(503, str(error), code=error.code)
        case LogitsError():
            return ApiError(500, str(error), code=error.code)
        case RecursionError():
            return ApiError(400, "The request is nested too deeply.", code="invalid_value")
    logger.error("request %s failed", REQUEST_ID.get(), exc_info=error)
    return ApiError(500, "An internal server error occurred.", code="internal_error")


def _part_named(message: str) -> str | None:
    """The part of a request that an error's text begins with: `tools[0].function.name`, `stop=`."""
    found = re.match(r"([a-z_]+)((?:\[\d+\]|\.\w+)*)(?=([:=]?))", message)
    return found[1] + found[2] if found and (found[2] or found[3]) else None


def _named_by_the_request(error: ConfigError, dialect: Dialect) -> ApiError:
    """A field of `GenerationConfig` has another name in requests, by which their errors call it."""
    told = str(error)
    found = re.match(r"GenerationConfig\.(\w+)", told)
    if found is None:
        return ApiError(400, told, code=error.code)
    name = dialect.names.get(found[1], found[1])
    return ApiError(400, name + told[found.end() :], param=name, code=error.code)


def failed_answer(code: str | None, message: str | None) -> ApiError:
    """The error that a `Response` with finish_reason "error" stands for."""
    status = _STATUS.get(code or "", 400)
    if code == LmdeployError.code:
        logger.error("request %s failed: %s", REQUEST_ID.get(), message)
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


def choice_error(error: ApiError | None) -> dict[str, Any]:
    """A choice's own error, for a choice that has one. Beside the choices, clients would throw it."""
    return {} if error is None else openai_body(error)


def error_response(path: str, error: ApiError) -> HttpResponse:
    """The HTTP response that tells of the error, in the shape of the protocol that `path` belongs to."""
    body = json.dumps(dialect_of(path).render(error)).encode()
    return HttpResponse(body, error.status, error.headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Every error of a route, the framework's too, gets its protocol's shape."""

    async def tell(request: Request, error: Exception) -> HttpResponse:
        path = request.url.path
        return error_response(path, as_api_error(error, dialect_of(path)))

    async def invalid(request: Request, error: Exception) -> HttpResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(request.url.path, validation_error(error.errors(), error.body))

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


def validation_error(errors: Sequence[Any], body: Any) -> ApiError:
    """400 with the first fault that pydantic found in the body; `param` is the path of the field.

    Where a value fits none of several types, there is one error a type: that tells most which came furthest.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    if first["loc"] == ("body",) and first["type"] == "missing":
        return ApiError(400, "The body is empty: send a JSON object.", code="invalid_json")
    field = _place(first, body)[:1]
    rivals = [error for error in errors if _place(error, body)[:1] == field]
    told = max(rivals, key=lambda error: _reach(_place(error, body)))
    param = ".".join(_place(told, body)) or None
    where = f"{param}: " if param else "The body: "
    return ApiError(400, where + told["msg"], param=param, code="invalid_value")


def _reach(place: Sequence[str]) -> tuple[int, list[int]]:
    """How far a check came before its fault: how deep, and then how far along lists."""
    return len(place), [int(part) for part in place if part.isdecimal()]


def _place(error: Any, body: Any) -> list[str]:
    """The path to a fault, without the names that pydantic puts between for the types it has tried."""
    root, *steps = error["loc"]
    if root != "body":
        return list(map(str, steps))
    place: list[str] = []
    for part in steps:
        inner = _at(body, part)
        if inner is not None or (part is steps[-1] and error["type"] == "missing"):
            place.append(str(part))
            body = inner
    return place


def _at(body: Any, part: Any) -> Any:
    if isinstance(body, dict):
        return body.get(part)
    return body[part] if isinstance(body, list) and isinstance(part, int) and part < len(body) else None
