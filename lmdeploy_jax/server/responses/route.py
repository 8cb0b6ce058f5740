"""POST /v1/responses, and what can be done with responses that are kept."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.server.errors import ApiError, Dialect, register_dialect
from lmdeploy_jax.server.generation import in_thread
from lmdeploy_jax.server.http.sse import EventStream
from lmdeploy_jax.server.ids import new_id, now
from lmdeploy_jax.server.responses.answer import ResponseShape, ResponseWriter, output_items
from lmdeploy_jax.server.responses.bodies import InputTokensRequest, ResponsesRequest
from lmdeploy_jax.server.responses.prompt import chat_call, continued, sampling
from lmdeploy_jax.server.responses.store import ResponseStore
from lmdeploy_jax.server.responses.text_logprobs import Entry, TextLogprobs
from lmdeploy_jax.server.routing import CurrentService, JsonRoute, check_fields

router = APIRouter(tags=["responses"], route_class=JsonRoute)
register_dialect(
    "/v1/responses",
    Dialect(
        prompt="input",
        names={"stop_words": "stop", "max_new_tokens": "max_output_tokens", "random_seed": "seed"},
    ),
)
REFUSED = {
    "background": "leave it out and stream instead.",
    "background_options": "leave it out and stream instead.",
    "conversation": "use previous_response_id.",
    "context_management": "shorten the conversation in your own client.",
    "prompt": "send the text itself.",
    "max_tool_calls": "use parallel_tool_calls: false.",
    "moderation": "this server judges nobody; ask a model for it.",
    "image": "this server answers with text.",
    "access_programs": "this server has none.",
    "personality": "say it in instructions.",
}


def store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


Store = Annotated[ResponseStore, Depends(store_of)]


@router.post("/v1/responses", response_model=None)
async def responses(
    body: ResponsesRequest, service: CurrentService, store: Store
) -> Response | dict[str, Any]:
    """Answer a conversation, whole or as a stream of events."""
    check_fields(service, body, REFUSED)
    conversation = continued(body, store, kept=body.store)
    model = service.check_model(body.model)
    shape = ResponseShape(new_id("resp").replace("-", "_"), now(), model, body, conversation.toolbox)
    config = service.defaults.config(sampling(body))
    call = chat_call(body, conversation, config, images=service.frontend.takes_images)
    answers = await service.answer(call, stream=body.stream, name=shape.id)
    logprobs = TextLogprobs(service.frontend.tokenizer, body.logprobs)
    if body.stream:
        return EventStream(ResponseWriter(shape, conversation, logprobs).events(answers), answers.close)
    told: list[Entry] = []
    (answer,) = await answers.complete(lambda delta: told.extend(chain(*logprobs.read(delta))))
    response = shape.ended(answer.finish, output_items(answer, conversation.toolbox, told), answers.usage)
    if answer.finish.error is None:
        conversation.keep(response)
    return response


@router.post("/v1/responses/input_tokens")
async def input_tokens(body: InputTokensRequest, service: CurrentService, store: Store) -> dict[str, Any]:
    """The tokens of a request's prompt, tools and images included."""
    check_fields(service, body, REFUSED)
    service.check_model(body.model)
    takes_images = service.frontend.takes_images
    call = chat_call(body, continued(body, store), GenerationConfig(), images=takes_images)
    count = await in_thread(partial(service.chat.count, call), images=call.prompt.has_images)
    return {"object": "response.input_tokens", "input_tokens": count}


@router.get("/v1/responses/{id}", response_model=None)
async def retrieve(id: str, store: Store, stream: bool = False) -> dict[str, Any]:
    """A response that is kept, as it ended."""
    if stream:
        raise ApiError(400, "stream: a response that is kept is given as a whole.", param="stream")
    return dict(store.get(id).body)


@router.delete("/v1/responses/{id}")
async def delete(id: str, store: Store) -> dict[str, Any]:
    """Forget a response."""
    store.get(id)
    store.remove(id)
    return {"id": id, "object": "response", "deleted": True}


@router.post("/v1/responses/{id}/cancel")
async def cancel(id: str, service: CurrentService, store: Store) -> dict[str, Any]:
    """End a response that is being made; its stream ends with what there is of it."""
    if service.abort(name=id):
        return {"id": id, "object": "response", "status": "cancelled"}
    status = store.get(id).body["status"]
    raise ApiError(400, f"Response {id!r} has ended already, as {status}.", code="invalid_value")


@router.get("/v1/responses/{id}/input_items")
async def input_items(
    id: str,
    store: Store,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """What the request of a response has said, item by item."""
    items = store.get(id).input[:: 1 if order == "asc" else -1]
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }
