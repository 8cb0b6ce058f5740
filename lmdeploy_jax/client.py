"""A client of the server, for programs without OpenAI's package; named as LMDeploy's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from lmdeploy_jax.errors import ConfigError, EngineError, RequestError

TIMEOUT = httpx.Timeout(None, connect=30)  # seconds; an answer may take any time


def server_url(url: str) -> str:
    """A server's URL without the end that OpenAI's clients write. Raises ConfigError."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url={url!r} is no URL of a server: give one like http://localhost:23333")
    return url.rstrip("/").removesuffix("/v1")


class APIClient:
    """Speaks to a server at `api_server_url`, such as "http://localhost:23333".

    Requests take the fields of their route by name. Raises `RequestError` for what the server refuses, with
    its message, `EngineError` where no server answers or it fails, and `ConfigError` for what is no URL.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None) -> None:
        self.url = server_url(api_server_url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT)

    @property
    def available_models(self) -> list[str]:
        """The names of the served models."""
        return [card["id"] for card in self._ask("GET", "/v1/models")["data"]]

    def chat_completions_v1(
        self, model: str, messages: str | list[dict[str, Any]], stream: bool = False, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """The answer as one object, or with `stream` its chunks, as the server's JSON has them."""
        body = {"model": model, "messages": messages, "stream": stream} | fields
        return self._answers("/v1/chat/completions", body)

    def completions_v1(
        self, model: str, prompt: str | list[Any], stream: bool = False, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """The same for a text that is continued, without a chat template."""
        return self._answers("/v1/completions", {"model": model, "prompt": prompt, "stream": stream} | fields)

    def encode(
        self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True
    ) -> tuple[Any, Any]:
        """Token ids and their number; lists of both for a list of texts."""
        body = {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}
        answer = self._ask("POST", "/v1/encode", body)
        return answer["input_ids"], answer["length"]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _answers(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if body["stream"]:
            yield from self._stream(path, body)
        else:
            yield self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        _check(response)
        answer: dict[str, Any] = response.json()
        return answer

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                _check(response)
                for line in _lines(response):
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _checked(json.loads(line[6:]))
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(f"No server answers at {self.url}: {error}")


def _lines(response: httpx.Response) -> Iterator[str]:
    """As JSON has them: httpx's own end at U+2028, U+0085 and others too, which answers may hold."""
    rest = ""
    for text in response.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from (line.rstrip("\r") for line in lines)


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    kind = RequestError if response.status_code < 500 else EngineError
    raise kind(f"{response.status_code}: {message}")


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """An event of a stream, unless it tells of a failure."""
    if event.get("error"):
        raise EngineError(event["error"]["message"])
    return event
