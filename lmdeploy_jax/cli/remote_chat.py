"""The conversation of `chat --url`: the model runs behind a server."""

from __future__ import annotations

import base64
import mimetypes
import sys
from pathlib import Path
from typing import Any

from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.client import APIClient
from lmdeploy_jax.errors import RequestError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class RemoteConversation:
    """Answers are printed as they come; reasoning before them, as the server tells it."""

    def __init__(self, url: str, model: str | None, api_key: str | None, flags: FlagSet) -> None:
        self._client = APIClient(url, api_key)
        self._model = model or self._client.available_models[0]
        self._first = [{"role": "system", "content": flags["system"]}] if flags["system"] else []
        self._history: list[dict[str, Any]] = []
        self._fields = _fields(flags)
        self._images: list[str] = []  # URLs, of the next message

    def answer(self, text: str) -> None:
        """Stream the answer to standard output; the turn is remembered once it is complete."""
        asked = [*self._history, {"role": "user", "content": self._content(text)}]
        said, reason, failure = "", None, None
        chunks = self._client.chat_completions_v1(
            self._model, [*self._first, *asked], stream=True, **self._fields
        )
        for chunk in chunks:
            for choice in chunk["choices"]:
                said += _printed(choice["delta"])
                reason = choice["finish_reason"] or reason
                failure = choice.get("error") or failure
        print(flush=True)
        if failure:
            raise RequestError(failure["message"])
        self._history = [*asked, {"role": "assistant", "content": said}]
        if reason == "length":
            print("[the answer was cut off: it reached the length limit]", file=sys.stderr)

    def show(self, source: str) -> None:
        """An image for the next message: a URL, which the server fetches, or a file, which is sent.

        Raises `RequestError` for a file that cannot be read.
        """
        self._images.append(source if "://" in source or source.startswith("data:") else _data_url(source))

    def forget(self) -> None:
        """Start anew; the system prompt stays."""
        self._history, self._images = [], []

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        images, self._images = self._images, []
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        return [*shown, {"type": "text", "text": text}] if shown else text


def _data_url(path: str) -> str:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise RequestError(f"the file {path!r} cannot be read: {error}. Check the path.") from error
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _printed(delta: dict[str, Any]) -> str:
    print(delta.get("reasoning_content") or "", end="")
    content: str = delta.get("content") or ""
    print(content, end="", flush=True)
    return content


def _fields(flags: FlagSet) -> dict[str, Any]:
    """Fields of the request. What no flag says is left to the server."""
    given = {name: flags[name] for name in SAMPLING if flags[name] is not None}
    if flags["enable_thinking"] is not None:
        given["chat_template_kwargs"] = {"enable_thinking": flags["enable_thinking"]}
    if flags["random_seed"] is not None:
        given["seed"] = flags["random_seed"]
    if flags["max_new_tokens"] < 1:
        raise RequestError(f"--max-new-tokens={flags['max_new_tokens']}: at least 1 is needed.")
    return given | {"max_tokens": flags["max_new_tokens"]}
