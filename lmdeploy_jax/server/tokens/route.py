"""Texts to tokens and back: POST /v1/encode, /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from lmdeploy_jax.engine.io.frontend import PromptOptions
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.generation import in_thread
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.server.tokens.bodies import DetokenizeRequest, EncodeRequest, TokenizeRequest
from lmdeploy_jax.text.conversation import normalise_messages
from lmdeploy_jax.text.prompts import Prompt

router = APIRouter(tags=["tokens"], route_class=JsonRoute)


@router.post("/v1/encode", response_model=None)
async def encode(body: EncodeRequest, service: CurrentService) -> Response:
    """The token ids of a text, or of several, and how many they are."""
    check_fields(service, body)
    return await asyncio.to_thread(_encoded, service, body)


def _encoded(service: Service, body: EncodeRequest) -> Response:
    if isinstance(body.input, str):
        ids = _encode(service, body.input, body)
        return _as_json({"input_ids": ids, "length": len(ids)})
    lists = [_encode(service, text, body) for text in body.input]
    return _as_json({"input_ids": lists, "length": [len(ids) for ids in lists]})


def _as_json(content: dict[str, Any]) -> Response:
    """Written where it is called: hundreds of thousands of ids would hold up the event loop."""
    return Response(orjson.dumps(content), media_type="application/json")


def _encode(service: Service, text: str, body: EncodeRequest) -> Sequence[int]:
    if body.do_preprocess:
        return service.frontend.encode(Prompt(text=text), PromptOptions(), to_count=True).ids
    return service.frontend.encode_text(text, add_bos=body.add_bos, to_count=True)


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, service: CurrentService) -> Response:
    """The token ids of a text or a conversation."""
    check_fields(service, body)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give exactly one of prompt and messages.", param="prompt")
    prompt = _prompt(body, images=service.frontend.takes_images)
    return await in_thread(partial(_tokenized, service, body, prompt), images=prompt.has_images)


def _prompt(body: TokenizeRequest, *, images: bool) -> Prompt:
    if body.messages is None:
        return Prompt(text=body.prompt)
    return Prompt(messages=tuple(normalise_messages(body.messages, images=images)))


def _tokenized(service: Service, body: TokenizeRequest, prompt: Prompt) -> Response:
    ids = _tokens(service, body, prompt)
    tokenizer = service.frontend.tokenizer
    return _as_json({
        "count": len(ids),
        "max_model_len": service.frontend.limits.session_len,
        "tokens": ids,
        "token_strs": [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None,
    })  # fmt: skip


def _tokens(service: Service, body: TokenizeRequest, prompt: Prompt) -> Sequence[int]:
    if prompt.text is not None:
        switch = body.add_special_tokens
        return service.frontend.encode_text(prompt.text, add_special_tokens=switch, to_count=True)
    variables = body.chat_template_kwargs or {}
    options = PromptOptions(tools=body.tools, template_kwargs=variables, access=service.media_access)
    return service.frontend.encode(prompt, options, to_count=True).ids


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: CurrentService) -> dict[str, str]:
    """The text of token ids."""
    check_fields(service, body)
    service.check_model(body.model)
    size = service.frontend.engine.vocab_size
    wrong = next((i for i in body.tokens if not 0 <= i < size), None)
    if wrong is not None:
        raise ApiError(400, f"tokens holds {wrong}, outside the vocabulary [0, {size}).", param="tokens")
    text = await asyncio.to_thread(
        service.frontend.tokenizer.decode, body.tokens, skip_special_tokens=body.skip_special_tokens
    )
    return {"prompt": text}
