"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lmdeploy_jax.server.routing import CurrentService, JsonRoute
from lmdeploy_jax.server.service import Service

router = APIRouter(tags=["models"], route_class=JsonRoute)


@router.get("/v1/models")
async def models(service: CurrentService) -> dict[str, Any]:
    """The models that are served."""
    return {"object": "list", "data": [_card(service, name) for name in service.models]}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: CurrentService) -> dict[str, Any]:
    """One model."""
    return _card(service, service.check_model(name))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "lmdeploy_jax",
        "root": name,
        "parent": None,
        "max_model_len": service.frontend.limits.session_len,
        "permission": [],
        "input_modalities": ["text", *(["image"] if service.frontend.takes_images else [])],
        "supported_parameters": _parameters(service),
    }


def _parameters(service: Service) -> list[str]:
    """Those fields of a chat request that not every model knows; the key is OpenRouter's."""
    read = service.frontend.template.reads & {"enable_thinking", "reasoning_effort"}
    return [*(["tools"] if service.chat.tools is not None else []), *sorted(read)]
