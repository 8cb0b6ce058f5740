"""A request's way to a node and back. Nothing of an answer is held, and none is begun twice."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmdeploy_jax.proxy.nodes import Node, Nodes
from lmdeploy_jax.server.errors import ApiError, error_response, openai_body
from lmdeploy_jax.server.http.disconnect import cancel_on_disconnect
from lmdeploy_jax.server.http.sse import data

logger = logging.getLogger("lmdeploy_jax")

# Of one connection, not of the message; the body's length is told anew, and `host` is the node's.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "upgrade",
     "transfer-encoding", "host", "content-length", "expect")
)  # fmt: skip
ELSEWHERE = (429, 502, 503)  # a node that is full, asleep, draining or not there: another may do it
_PREFIX_BYTES = 4096
_FAULTS = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(frozen=True)
class Wanted:
    """What a request's body says of where it should go. `stored`: it asks for what one node keeps."""

    model: str | None = None
    prefix: bytes = b""
    stored: bool = False

    @classmethod
    def of(cls, body: bytes, method: str) -> Wanted:
        """Bodies that are no JSON objects go anywhere: the node will say what is wrong with them."""
        try:
            fields = orjson.loads(body) if body else None
        except orjson.JSONDecodeError:
            return cls()
        if not isinstance(fields, dict):
            return cls(stored=method != "POST")
        model = fields.get("model")
        return cls(
            model if isinstance(model, str) and model else None,
            _beginning(fields),
            "previous_response_id" in fields or model is None,
        )


def _beginning(fields: dict[str, Any]) -> bytes:
    """What a conversation's requests have in common: the first of what the model reads."""
    read = next((fields[name] for name in ("messages", "prompt", "input") if name in fields), None)
    first = read[:2] if isinstance(read, list) else read
    return orjson.dumps([fields.get("system"), fields.get("instructions"), first])[:_PREFIX_BYTES]


class RelayedAnswer(Response, ABC):
    """An answer that another server makes, as it comes. Until it has begun nothing is said of it, and
    somebody else may be asked.
    """

    def __init__(self) -> None:
        self.background = None
        self._begun = self._streams = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(self._answer(send), receive)
        except ClientDisconnect:
            pass
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)

    @abstractmethod
    async def _answer(self, send: Send) -> None:
        """Raises ApiError where nobody has begun to answer."""

    async def _broken_off(self, send: Send, who: str, why: str = "") -> None:
        """A stream can say so; what has a length ends too early, which every client notices."""
        error = ApiError(502, f"{who} ended in the middle of its answer{why}.")
        if not self._streams:
            raise ConnectionError(error.message)
        await send({"type": "http.response.body", "body": data(openai_body(error))})


class Relay(RelayedAnswer):
    """The answer of the node that gets the request, as it comes. A node that refuses it, or goes before its
    answer has begun, is replaced by another; one that goes later ends a stream with an error.
    """

    def __init__(self, request: Request, body: bytes, nodes: Nodes, session: aiohttp.ClientSession) -> None:
        super().__init__()
        self._request, self._body, self._nodes, self._session = request, body, nodes, session
        self._wanted = Wanted.of(body, request.method)

    async def _answer(self, send: Send) -> None:
        left = self._nodes.candidates(self._wanted.model)
        while left:
            node = self._nodes.best(left, self._wanted.prefix)
            left.remove(node)
            try:
                with node.working():
                    if await self._tried(node, send, last=not left):
                        return
            except _FAULTS as error:
                node.failures += 1
                logger.warning("node %s failed: %s", node.url, error or type(error).__name__)
                if self._begun:
                    await self._broken_off(send, f"The node {node.url}")
                    return
        raise ApiError(502, "Every node that could have answered failed before its answer began.")

    async def _tried(self, node: Node, send: Send, *, last: bool) -> bool:
        """Whether the node answered, or was the last that could."""
        url = (
            node.url
            + self._request.url.path
            + ("?" + self._request.url.query if self._request.url.query else "")
        )
        method, headers = self._request.method, self._to_pass()
        async with self._session.request(method, url, data=self._body, headers=headers) as answer:
            refused = answer.status in ELSEWHERE or (answer.status == 404 and self._wanted.stored)
            if refused and not last:
                return False
            await self._relayed(answer, send)
        return True

    def _to_pass(self) -> list[tuple[str, str]]:
        client = self._request.client.host if self._request.client else ""
        passed = [
            x for x in _passed(self._request.headers.items()) if x[0] != "content-encoding"
        ]  # undone here
        return [*passed, ("x-forwarded-for", client), ("x-forwarded-proto", self._request.url.scheme)]

    async def _relayed(self, answer: aiohttp.ClientResponse, send: Send) -> None:
        headers = _passed(answer.headers.items())
        self._streams = answer.content_type == "text/event-stream"
        if answer.content_length is not None and not self._streams:  # a stream may end with an error of ours
            headers.append(("content-length", str(answer.content_length)))
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        self._begun = True
        async for part in answer.content.iter_any():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _passed(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]
