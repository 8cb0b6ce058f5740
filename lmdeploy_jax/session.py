"""A conversation that a Pipeline carries on, and the way to abort what runs in it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from lmdeploy_jax.errors import RequestConflictError
from lmdeploy_jax.messages import GenerationConfig, Response, shortened

# A user's text, one with an image or images, a message, or several messages.
Turn = str | tuple[Any, Any] | Mapping[str, Any] | list[Mapping[str, Any]]
_ids = itertools.count()


class Session:
    """The turns so far, and at most one answer under way.

    prompt, response: the last turn's, whether it was completed or not.
    history: (prompt, answer's text) of every completed turn; an aborted or failed turn is not among them.
    gen_config: used where `chat` gets none.
    """

    def __init__(self, gen_config: GenerationConfig | None = None) -> None:
        self.session_id = next(_ids)
        self.gen_config = gen_config
        self.prompt: Turn | None = None
        self.response: Response | None = None
        self.history: list[tuple[Turn, str]] = []
        self._lock = threading.Lock()
        self._active: Callable[[], None] | None = None

    def __repr__(self) -> str:
        answer = "" if self.response is None else f", answer {shortened(self.response.text)}"
        return f"<Session {self.session_id}: {len(self.history)} turns{answer}>"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the conversation, with an answer that is no part of it in the end."""
        turns = [*self.history]
        if self.response is not None and self.response.finish_reason not in ("stop", "length"):
            turns.append((self.prompt or "", self.response._repr_markdown_()))
        return (
            "\n\n".join(f"{_quoted(asked)}\n\n{answer}" for asked, answer in turns)
            or "*An empty conversation.*"
        )

    @property
    def active(self) -> bool:
        """Whether an answer is under way."""
        return self._active is not None

    def messages(self, prompt: Turn) -> list[Mapping[str, Any]]:
        """The whole conversation with `prompt` as its next turn."""
        turns: list[Mapping[str, Any]] = []
        for asked, answer in self.history:
            turns += [*_messages(asked), {"role": "assistant", "content": answer}]
        return turns + _messages(prompt)

    def abort(self) -> None:
        """End the answer under way, if any: it then finishes with finish_reason "abort"."""
        active = self._active
        if active is not None:
            active()

    def reset(self) -> None:
        """Abort, and forget the conversation."""
        self.abort()
        self.prompt, self.response, self.history = None, None, []

    def close(self) -> None:
        """The same as `reset`: a session holds nothing in the engine between its turns."""
        self.reset()

    def begin(self, abort: Callable[[], None]) -> None:
        """Mark an answer as under way. Raises `RequestConflictError` if another one is."""
        with self._lock:
            if self._active is not None:
                raise RequestConflictError(f"Session {self.session_id} already has an active request.")
            self._active = abort

    def end(self) -> None:
        """Mark the answer under way as ended."""
        self._active = None


def _quoted(turn: Turn) -> str:
    """What a turn asks, as a quotation that tells it from the answer."""
    said = [f"**{message['role']}:** {_text(message.get('content'))}" for message in _messages(turn)]
    return "\n>\n".join("> " + text.replace("\n", "\n> ") for text in said)


def _text(content: Any) -> str:
    """A message's text; other parts, such as images, as their names."""
    if isinstance(content, str) or content is None:
        return content or ""
    return " ".join(part.get("text") or f"*({part.get('type')})*" for part in content)


def _messages(turn: Turn) -> list[Mapping[str, Any]]:
    if isinstance(turn, str):
        return [{"role": "user", "content": turn}]
    if isinstance(turn, tuple):
        from lmdeploy_jax.text.prompts import pair_message  # tokenizers are loaded with `text`

        return [pair_message(turn)]
    return [turn] if isinstance(turn, Mapping) else list(turn)
