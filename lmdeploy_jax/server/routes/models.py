"""GET /v1/models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter

from lmdeploy_jax.server.routing import CurrentService, JsonRoute
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.text.template_arguments import THINKING

router = APIRouter(tags=["models"], route_class=JsonRoute)


@router.get("/v1/models")
async def models(service: CurrentService) -> dict[str, Any]:
    """The models that are served."""
    return {"object": "list", **_listed(service)}


@router.get("/anthropic/v1/models")
async def anthropic_models(service: CurrentService) -> dict[str, Any]:
    """The same in Anthropic's shape."""
    return _listed(service)


@router.get("/v1/models/{name:path}")
async def model(name: str, service: CurrentService) -> dict[str, Any]:
    """One model."""
    return _card(service, service.check_model(name))


def _listed(service: Service) -> dict[str, Any]:
    """What OpenAI's list has, and what Anthropic's pages have."""
    ends = {"first_id": service.models[0], "last_id": service.models[-1], "has_more": False}
    return {"data": [_card(service, name) for name in service.models], **ends}


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
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
    reads = service.frontend.template.reads
    known = {
        "tools": service.chat.tools is not None,
        "enable_thinking": not reads.isdisjoint(THINKING),
        "reasoning_effort": "reasoning_effort" in reads,
    }
    return [name for name, is_known in known.items() if is_known]
