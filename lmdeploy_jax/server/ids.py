"""Fresh ids of answers, and of tool calls, by which their results are sent back."""

from __future__ import annotations

import secrets
import string
import time
import uuid

_LETTERS = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """An answer's id."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """The time at which an answer was created, in seconds since 1970."""
    return int(time.time())


class ToolCallIds:
    """Fresh ids in a protocol's form. `bare` ones are nine letters or digits, as Mistral's templates want."""

    def __init__(self, prefix: str = "call_", length: int = 24, *, bare: bool = False) -> None:
        self._prefix = "" if bare else prefix
        self._length = 9 if bare else length

    def new(self) -> str:
        return self._prefix + "".join(secrets.choice(_LETTERS) for _ in range(self._length))
