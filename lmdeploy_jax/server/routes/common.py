"""What every route needs: the service, and what becomes of fields that nobody knows."""

from __future__ import annotations

import logging
import time
import uuid
from typing import Annotated, Any

from fastapi import Depends, Request

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.protocol.common import ProtocolModel
from lmdeploy_jax.server.service import Service

logger = logging.getLogger("lmdeploy_jax")
_MOST_NAMES = 256  # unknown fields that are told of, each once


def service_of(request: Request) -> Service:
    return request.app.state.service


CurrentService = Annotated[Service, Depends(service_of)]


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def check_fields(service: Service, body: ProtocolModel, refused: dict[str, str] | None = None) -> None:
    """Refuse fields that change the meaning of a request and cannot be honoured: name -> what to do instead.

    Other unknown fields are ignored, with a line in the log for each new name; with `strict` they are errors.
    """
    extra = body.model_extra or {}
    for name, remedy in (refused or {}).items():
        if extra.get(name):
            raise ApiError(400, f"{name} is not supported: {remedy}", param=name, code="unsupported_field")
    if extra and service.options.strict:
        name = next(iter(extra))
        raise ApiError(400, f"{name}: unknown field.", param=name, code="unknown_field")
    _tell_unknown(service, extra)


def _tell_unknown(service: Service, extra: dict[str, Any]) -> None:
    new = extra.keys() - service.unknown_fields
    if new and len(service.unknown_fields) < _MOST_NAMES:
        service.unknown_fields.update(new)
        logger.warning("unknown request fields are ignored: %s", ", ".join(sorted(new)))
