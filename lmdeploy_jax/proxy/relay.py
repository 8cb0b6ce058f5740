"""A request's way to a node and back. Nothing of an answer is held, and none is begun twice."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import aiohttp
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from lmdeploy_jax.proxy.nodes import Node, Nodes
from lmdeploy_jax.server.errors import ApiError, error_response, openai_body
from lmdeploy_jax.server.http.disconnect import cancel_on_disconnect
from lmdeploy_jax.server.http.sse import data

logger = logging.getLogger("lmdeploy_jax")

# Of one connection, not of the message; the body's length is told anew, and `host` is the node's.
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
     b"upgrade", b"transfer-encoding", b"host", b"content-length", b"expect")
)  # fmt: skip
# What aiohttp would add: a client that reads nothing compressed would be sent it.
_NOT_ADDED = ("accept", "accept-encoding", "content-type", "user-agent")
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
        start = monotonic()
        with node.working():
            async with self._asked(node) as answer:
                refused = answer.status in ELSEWHERE or (answer.status == 404 and self._wanted.stored)
                if refused and not last:
                    return False
                await self._relayed(answer, send)
        if not refused:  # how fast a node says no is not how fast it works
            node.answered(monotonic() - start)
        return True

    def _asked(self, node: Node) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        scope, headers = self._request.scope, _passed(self._request.headers.raw)
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        url = node.url + (scope["raw_path"] + query).decode("latin-1")
        told = [(name, value) for name, value in headers if name != b"content-encoding"]  # undone here
        told.append((b"x-forwarded-for", (scope["client"] or ("",))[0].encode()))
        told.append((b"x-forwarded-proto", scope["scheme"].encode()))
        return self._session.request(
            scope["method"],
            URL(url, encoded=True),  # as the client wrote it: what stands for a slash is none
            data=self._body or None,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in told],
            skip_auto_headers=_NOT_ADDED,
        )

    async def _relayed(self, answer: aiohttp.ClientResponse, send: Send) -> None:
        headers = _passed(answer.raw_headers)
        self._streams = answer.content_type == "text/event-stream"
        if answer.content_length is not None and not self._streams:  # a stream may end with an error of ours
            headers.append((b"content-length", b"%d" % answer.content_length))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        self._begun = True
        async for part in answer.content.iter_any():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _passed(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    lowered = ((name.lower(), value) for name, value in headers)
    return [header for header in lowered if header[0] not in _HOP_BY_HOP]
