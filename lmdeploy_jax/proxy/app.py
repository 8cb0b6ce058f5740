"""The proxy's application: LMDeploy's routes for nodes, and everything else passed on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from lmdeploy_jax.proxy.nodes import Node, Nodes, checked_url
from lmdeploy_jax.proxy.options import ProxyOptions
from lmdeploy_jax.proxy.relay import Relay
from lmdeploy_jax.server.errors import ApiError, install_handlers
from lmdeploy_jax.server.http.cors import add_cors
from lmdeploy_jax.server.http.middleware import Authentication, BodyLimit, ServerErrors
from lmdeploy_jax.server.http.request_ids import RequestIds

logger = logging.getLogger("lmdeploy_jax")

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_ASKED = aiohttp.ClientTimeout(total=10)  # seconds for what the proxy itself asks a node
_BODY_SECONDS = 60.0
_KEPT = 3.0  # seconds that an idle connection is kept, before the node, as uvicorn does after 5, closes it


def create_proxy(options: ProxyOptions) -> FastAPI:
    """The application over the nodes that the options name."""
    proxy = _Proxy(options)
    app = FastAPI(
        title="lmdeploy_jax proxy", lifespan=proxy.lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_api_route("/health", proxy.health, methods=["GET"])
    app.add_api_route("/v1/models", proxy.models, methods=["GET"])
    app.add_api_route("/nodes/status", proxy.status, methods=["GET"])
    for name in ("add", "remove", "terminate"):
        app.add_api_route(f"/nodes/{name}", getattr(proxy, name), methods=["POST"])
    app.add_api_route("/nodes/terminate_all", proxy.terminate_all, methods=["GET", "POST"])
    app.add_api_route("/{path:path}", proxy.forward, methods=METHODS)
    install_handlers(app)
    app.add_middleware(BodyLimit, most=options.max_body_size, seconds=_BODY_SECONDS)
    if options.api_keys:
        app.add_middleware(Authentication, keys=options.api_keys)
    app.add_middleware(ServerErrors)
    add_cors(app, options)  # for browsers the proxy is the server, whatever its nodes allow
    app.add_middleware(RequestIds)
    return app


class _Proxy:
    """The routes, and what looks after the nodes."""

    def __init__(self, options: ProxyOptions) -> None:
        self._options = options
        self._nodes = Nodes(options.routing_strategy)
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Part of starlette's interface: what runs as long as the application does."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._options.connect_timeout)
        # As many connections as there are requests; what is compressed stays so; no proxy of the environment;
        # a cookie is its client's, who sends it again.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            self._session = session
            for url in map(checked_url, self._options.nodes):
                self._nodes.add(url, ())
            looking = asyncio.create_task(self._look_after())
            try:
                yield
            finally:
                looking.cancel()
                with suppress(asyncio.CancelledError):
                    await looking

    async def _look_after(self) -> None:
        while True:
            await asyncio.gather(*map(self._look_at, self._nodes))
            await asyncio.sleep(self._options.health_interval)

    async def _look_at(self, node: Node) -> None:
        try:
            async with self._session.get(node.url + "/health", timeout=_ASKED) as answer:
                answer.raise_for_status()
            if not node.models or not node.well:
                node.models = await self._served(node.url)
            node.failures = 0
        except (aiohttp.ClientError, OSError, TimeoutError, ApiError) as error:
            node.failures += 1
            logger.warning("node %s is not well: %s", node.url, error or type(error).__name__)

    async def _served(self, url: str) -> tuple[str, ...]:
        """The names of a node's models. Raises ApiError (502) where it does not tell."""
        key = next(iter(self._options.api_keys), None)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with self._session.get(url + "/v1/models", headers=headers, timeout=_ASKED) as answer:
                answer.raise_for_status()
                return tuple(str(card["id"]) for card in orjson.loads(await answer.read())["data"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ApiError(
                502, f"The node {url} does not say what it serves: {error!r}.", param="url"
            ) from error

    async def health(self) -> JSONResponse:
        """Whether any node takes requests."""
        well = sum(node.well and bool(node.models) for node in self._nodes)
        return JSONResponse(
            {"status": "healthy" if well else "unhealthy", "nodes": well}, 200 if well else 503
        )

    async def models(self) -> dict[str, Any]:
        """The models of all nodes."""
        cards = [{"id": name, "object": "model", "owned_by": "lmdeploy_jax"} for name in self._nodes.models]
        return {"object": "list", "data": cards}

    async def status(self) -> dict[str, Any]:
        """Each node by its URL."""
        return {node.url: node.status for node in self._nodes}

    async def add(self, request: Request) -> dict[str, Any]:
        """Take a node in. Without `status.models` it is asked what it serves."""
        body = await _object(request)
        url, status = checked_url(body.get("url")), body.get("status") or {}
        if not isinstance(status, dict):
            raise ApiError(400, f"status={status!r} is no object.", param="status")
        models, speed = status.get("models") or [], status.get("speed")
        if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
            raise ApiError(400, f"status.models={models!r} is no list of names.", param="status.models")
        if speed is not None and (
            isinstance(speed, bool) or not isinstance(speed, int | float) or speed <= 0
        ):
            raise ApiError(400, f"status.speed={speed!r} must be a number above 0.", param="status.speed")
        node = self._nodes.add(url, tuple(models) or await self._served(url), speed)
        if not node.well:
            await self._look_at(node)
        return {"message": "Added successfully", "url": url}

    async def remove(self, request: Request) -> dict[str, Any]:
        """Forget a node; it goes on by itself."""
        url = checked_url((await _object(request)).get("url"))
        self._nodes.remove(url)
        return {"message": "Deleted successfully", "url": url}

    async def terminate(self, request: Request) -> dict[str, Any]:
        """End a node's server, which must allow it (--allow-terminate-by-client), and forget it."""
        url = checked_url((await _object(request)).get("url"))
        node = next((each for each in self._nodes if each.url == url), None)
        if node is not None:
            await self._end(node, request)
        self._nodes.remove(url)
        return {"message": "Terminated successfully", "url": url}

    async def terminate_all(self, request: Request) -> dict[str, Any]:
        """The same with every node."""
        ended = list(self._nodes)
        for node in ended:
            await self._end(node, request)
            self._nodes.remove(node.url)
        return {"message": "Terminated successfully", "urls": [node.url for node in ended]}

    async def _end(self, node: Node, request: Request) -> None:
        headers = {
            name: request.headers[name] for name in ("authorization", "x-api-key") if name in request.headers
        }
        try:
            async with self._session.get(node.url + "/terminate", headers=headers, timeout=_ASKED) as answer:
                status = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(502, f"The node {node.url} cannot be reached: {error!r}.") from error
        if status >= 400:
            raise ApiError(
                502,
                f"The node {node.url} does not end (it answered {status}): see --allow-terminate-by-client.",
            )

    async def forward(self, request: Request) -> Response:
        """Everything that is not the proxy's own."""
        return Relay(request, await request.body(), self._nodes, self._session)


async def _object(request: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return body
