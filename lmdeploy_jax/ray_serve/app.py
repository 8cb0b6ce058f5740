"""The deployments: replicas, each a server over an engine of its own, and what relays requests to them."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any, NamedTuple

import ray
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import Send

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.engine.process.replicas import open_remote
from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.proxy.app import METHODS
from lmdeploy_jax.proxy.relay import ELSEWHERE, RelayedAnswer, Wanted
from lmdeploy_jax.ray_serve.router import PrefixRouter
from lmdeploy_jax.server.app import MAX_BODY_SIZE_WITH_IMAGES, create_app
from lmdeploy_jax.server.errors import ApiError, install_handlers
from lmdeploy_jax.server.http.middleware import BodyLimit
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.server.run import check
from lmdeploy_jax.server.service import Service

_ATTEMPTS = 3  # replicas that a request is given to, one after the other
_RELAYED = 100_000  # requests that the ingress relays at once, which costs it next to nothing
_BODY_SECONDS = 60.0
_GRACE = 5.0  # seconds more than a replica's in which answers that were cut still reach their clients
Message = MutableMapping[str, Any]  # of ASGI


class RayOptions(BaseModel):
    """engine, server: fields of `JaxEngineConfig` and `ServerOptions`.

    Replicas come and go between `min_replicas` and `max_replicas`, so that each has about
    `target_ongoing_requests` that run or wait; `autoscaling` holds more fields of Ray's `AutoscalingConfig`.
    gpus: of one replica; None: tp * dp where the cluster has any.
    """

    model: str
    engine: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(64.0, gt=0)
    autoscaling: dict[str, Any] = Field(default_factory=dict)
    gpus: float | None = Field(None, ge=0)


class Asked(NamedTuple):
    """A request on its way. prefix: what its conversation begins with; refused: replicas that have."""

    scope: dict[str, Any]
    body: bytes
    prefix: bytes
    refused: tuple[str, ...] = ()


class Replica:
    """A model with the routes of the server."""

    def __init__(self, model: str, config: JaxEngineConfig, options: ServerOptions) -> None:
        prepared = prepare(model, config)
        check(options, prepared)
        self._engine = open_remote(prepared.folder, prepared.config, progress=False)
        self._app = create_app(Service(Frontend.from_engine(self._engine, prepared), options, model))
        self._name = serve.get_replica_context().replica_id.unique_id

    async def answer(self, asked: Asked) -> AsyncIterator[str | Message]:
        """This replica's name, then the answer as ASGI's messages."""
        yield self._name
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(asked, messages))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            task.cancel()  # as if its client had hung up, where it has not ended

    async def _run(self, asked: Asked, messages: asyncio.Queue[Message | None]) -> None:
        parts = [{"type": "http.request", "body": asked.body}]

        async def receive() -> Message:
            return parts.pop() if parts else await asyncio.Future()

        try:
            await self._app(asked.scope, receive, messages.put)
        finally:
            messages.put_nowait(None)

    def check_health(self) -> None:
        """Part of Ray's interface: a replica that raises here is replaced."""
        if self._engine.failure is not None:
            raise EngineError(f"The engine has failed: {self._engine.failure}.")

    def __del__(self) -> None:
        """Part of Ray's interface: called when running answers have ended, or time is up."""
        if hasattr(self, "_engine"):
            self._engine.close()


class _Relay(RelayedAnswer):
    """A replica's answer as it comes. One that refuses, or goes before its answer has begun, is replaced by
    another; one that goes later ends a stream with an error.
    """

    def __init__(self, request: Request, body: bytes, replicas: DeploymentHandle) -> None:
        super().__init__()
        self._replicas = replicas
        kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
                "headers", "client", "server")  # fmt: skip
        scope = {name: request.scope[name] for name in kept if name in request.scope}
        self._asked = Asked(scope, body, Wanted.of(body, request.method).prefix)

    async def _answer(self, send: Send) -> None:
        for left in reversed(range(_ATTEMPTS)):
            try:
                if await self._tried(send, last=not left):
                    return
            except (RayError, RayServeException) as error:
                if self._begun:
                    await self._broken_off(send, "The replica", f": {type(error).__name__}")
                    return
        raise ApiError(502, f"{_ATTEMPTS} replicas failed before their answers began.")

    async def _tried(self, send: Send, *, last: bool) -> bool:
        """Whether a replica answered, or was the last that could."""
        messages = self._replicas.answer.remote(self._asked)
        try:
            name = await anext(messages)
            async for message in messages:
                if message["type"] == "http.response.start":
                    if message["status"] in ELSEWHERE and not last:
                        self._asked = self._asked._replace(refused=(*self._asked.refused, name))
                        return False
                    types = [value for key, value in message["headers"] if key == b"content-type"]
                    self._streams = any(value.startswith(b"text/event-stream") for value in types)
                await send(message)
                self._begun = True
        finally:
            messages.cancel()
        return True


_app = FastAPI(title="lmdeploy_jax", docs_url=None, redoc_url=None, openapi_url=None)
_app.add_middleware(BodyLimit, most=MAX_BODY_SIZE_WITH_IMAGES, seconds=_BODY_SECONDS)
install_handlers(_app)


@serve.ingress(_app)
class Ingress:
    """The one address."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    @_app.api_route("/{path:path}", methods=METHODS)
    async def forward(self, request: Request) -> Response:
        """Every route is the replicas'."""
        return _Relay(request, await request.body(), self._replicas)


def build_app(options: RayOptions) -> serve.Application:
    """For `serve run`, a config file of Ray Serve, or `serve.run`. Raises ConfigError."""
    config, server = JaxEngineConfig(**options.engine), ServerOptions(**options.server)
    gpus = options.gpus
    if gpus is None:
        gpus = config.tp * config.dp if ray.cluster_resources().get("GPU") else 0
    target = options.target_ongoing_requests
    replica = serve.deployment(
        ray_actor_options={"num_gpus": gpus},
        max_ongoing_requests=max(int(4 * target), 1),
        graceful_shutdown_timeout_s=server.drain_seconds,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            initial_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=target,
            **options.autoscaling,
        ),
    )(Replica)
    ingress = serve.deployment(
        max_ongoing_requests=_RELAYED, graceful_shutdown_timeout_s=server.drain_seconds + _GRACE
    )(Ingress)
    return ingress.bind(replica.bind(options.model, config, server))
