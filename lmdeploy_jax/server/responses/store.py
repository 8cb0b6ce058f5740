"""The conversations that requests go on with by `previous_response_id`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.text.conversation import ImagePart

Message = dict[str, Any]
STORED_RESPONSES = 1024  # the oldest conversations are forgotten beyond that
STORED_CHARACTERS = 64 << 20  # or beyond so much text in all


class ResponseStore:
    """Conversations by the id of their last response, without instructions: those hold for one request."""

    def __init__(self, capacity: int = STORED_RESPONSES, characters: int = STORED_CHARACTERS) -> None:
        self._capacity = capacity
        self._characters = characters
        self._sizes: dict[str, int] = {}
        self._held = 0  # characters
        self._conversations: OrderedDict[str, list[Message]] = OrderedDict()

    def get(self, id: str) -> list[Message]:
        """Raises `ApiError` 404 for one that is not known, or not any more."""
        if id not in self._conversations:
            raise ApiError(
                404,
                f"previous_response_id: no response {id!r} is kept; it was not stored, or is forgotten.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._conversations.move_to_end(id)
        return self._conversations[id]

    def put(self, id: str, conversation: list[Message]) -> None:
        self._conversations[id] = conversation
        self._sizes[id] = _characters(conversation)
        self._held += self._sizes[id]
        while len(self._conversations) > self._capacity or self._held > self._characters:
            oldest, _ = self._conversations.popitem(last=False)
            self._held -= self._sizes.pop(oldest)


def _characters(part: Any) -> int:
    """Roughly what a conversation takes, without writing it out: images are long texts."""
    match part:
        case str():
            return len(part)
        case ImagePart():
            return _characters(part.source)
        case dict():
            return sum(map(_characters, part)) + sum(map(_characters, part.values()))
        case list():
            return sum(map(_characters, part))
    return len(str(part))
