"""Responses that are kept: to go on from by `previous_response_id`, and to be read again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.text.conversation import ImagePart

Message = dict[str, Any]
Item = dict[str, Any]
STORED_RESPONSES = 1024  # the oldest conversations are forgotten beyond that
STORED_CHARACTERS = 64 << 20  # or beyond so much text in all


@dataclass(frozen=True)
class StoredResponse:
    """messages: the conversation up to and with the answer, without instructions: those hold for one request.
    body: the response object; input: the items that the request has added to the conversation.
    """

    messages: list[Message]
    body: Mapping[str, Any] = field(default_factory=dict)
    input: list[Item] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        return [*self.input, *self.body.get("output", ())]


class ResponseStore:
    """Responses by their ids."""

    def __init__(self, capacity: int = STORED_RESPONSES, characters: int = STORED_CHARACTERS) -> None:
        self._capacity = capacity
        self._characters = characters
        self._sizes: dict[str, int] = {}
        self._held = 0  # characters
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, Item] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._responses

    def get(self, id: str, param: str = "response_id") -> StoredResponse:
        """Raises `ApiError` 404 for one that is not known, or not any more. param: who names it."""
        if id not in self._responses:
            message = f"{param}: no response {id!r} is kept; it was not stored, or is forgotten."
            code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
            raise ApiError(404, message, param=param, code=code)
        self._responses.move_to_end(id)
        return self._responses[id]

    def item(self, id: str) -> Item:
        """An item of a response that is kept. Raises `ApiError` 404."""
        if id not in self._items:
            raise ApiError(
                404, f"item_reference: no item {id!r} is kept.", param="input", code="item_not_found"
            )
        return self._items[id]

    def put(self, id: str, response: StoredResponse) -> None:
        self._responses[id] = response
        self._sizes[id] = sum(map(_characters, (response.messages, response.body, response.input)))
        self._held += self._sizes[id]
        self._items.update((item["id"], item) for item in response.items if isinstance(item.get("id"), str))
        while len(self._responses) > self._capacity or self._held > self._characters:
            self.remove(next(iter(self._responses)))

    def remove(self, id: str) -> None:
        """Forget one that is kept."""
        for item in self._responses.pop(id).items:
            self._items.pop(item.get("id", ""), None)
        self._held -= self._sizes.pop(id)


def _characters(part: Any) -> int:
    """Roughly what a conversation takes, without writing it out: images are long texts."""
    match part:
        case str():
            return len(part)
        case ImagePart():
            return _characters(part.source)
        case Mapping():
            return sum(map(_characters, part)) + sum(map(_characters, part.values()))
        case list():
            return sum(map(_characters, part))
    return len(str(part))
