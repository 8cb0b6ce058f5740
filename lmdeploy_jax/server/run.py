"""A server process: uvicorn over the application, and an end without torn answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from lmdeploy_jax.engine.io.sampling_defaults import SamplingDefaults
from lmdeploy_jax.engine.prepare import PreparedModel
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.server.app import create_app
from lmdeploy_jax.server.chat.formats import select_parsers
from lmdeploy_jax.server.http.http10 import Http10
from lmdeploy_jax.server.http.sockets import check_certificate, release, url_of
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.server.registration import Registration
from lmdeploy_jax.server.service import Service

_GRACE = 5.0  # seconds after the deadline in which answers that were cut still reach their clients


def check(options: ServerOptions, model: PreparedModel) -> None:
    """Everything about the options that can be told before the model is loaded.

    Raises ConfigError for what names nothing or would do nothing, CheckpointError, and OSError for files that
    cannot be used.
    """
    _check_media_path(options)
    _check_proxy(options)
    check_certificate(options)
    select_parsers(options, model.template)
    SamplingDefaults.read(options.generation_config, model.folder)


def _check_media_path(options: ServerOptions) -> None:
    """Raises ConfigError for what is no folder."""
    path = options.allowed_local_media_path
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"allowed_local_media_path={path!r} is no folder: name one, or leave it out.")


def _check_proxy(options: ServerOptions) -> None:
    """Raises ConfigError for what is no URL."""
    parts = None if options.proxy_url is None else urlsplit(options.proxy_url)
    if parts is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ConfigError(
            f"proxy_url={options.proxy_url!r} is no URL of a proxy: give one like http://10.0.0.1:8000."
        )


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then takes in nothing more, and cuts what runs beyond the deadline.

    tell: is given the URL once connections are taken.
    """

    def __init__(self, service: Service, tell: Callable[[str], None] = lambda url: None) -> None:
        options = service.options
        self.service = service
        self._tell = tell
        self._registration: Registration | None = None
        self.lost_a_node = False
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=options.server_name,
                port=options.server_port,
                http=Http10,
                log_level="warning",
                access_log=False,
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                timeout_graceful_shutdown=int(options.drain_seconds + _GRACE),
                lifespan="off",
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's interface: starts to listen."""
        release(sockets or ())
        await super().startup(sockets)
        if self.started:
            self._tell(self._url(local=True))
            if self.service.options.proxy_url is not None:
                self._registration = Registration(self.service.options, self._url(), self.service.models)

    async def on_tick(self, counter: int) -> bool:
        """Part of uvicorn's interface, asked ten times a second: whether the server is to end."""
        self.lost_a_node = self._lost_a_node()
        return self.lost_a_node or await super().on_tick(counter)

    def _lost_a_node(self) -> bool:
        """Then nothing can be answered any more before all nodes are started again."""
        engine = self.service.frontend.engine
        return engine.config.nnodes > 1 and engine.failure is not None

    def _url(self, *, local: bool = False) -> str:
        options = self.service.options
        return url_of(
            options, options.server_port or self.servers[0].sockets[0].getsockname()[1], local=local
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's interface: called when the server is to end."""
        if self._registration is not None:
            await asyncio.to_thread(self._registration.close)
        self.service.drain()
        abort = partial(self.service.abort, everything=True)
        deadline = asyncio.get_running_loop().call_later(self.service.options.drain_seconds, abort)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()
