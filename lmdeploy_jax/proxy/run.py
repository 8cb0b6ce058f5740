"""The proxy's process: uvicorn over its application."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.proxy.app import create_proxy
from lmdeploy_jax.proxy.nodes import checked_url
from lmdeploy_jax.proxy.options import ProxyOptions
from lmdeploy_jax.server.errors import ApiError
from lmdeploy_jax.server.http.http10 import Http10
from lmdeploy_jax.server.http.sockets import bind, check_certificate, release, url_of

_GRACE = 30  # seconds that running answers may go on after SIGTERM


def serve(options: ProxyOptions, tell: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigError for what is no node's address, OSError where the address
    cannot be had or the certificate cannot be read.
    """
    for url in options.nodes:
        try:
            checked_url(url)
        except ApiError as error:
            raise ConfigError(f"nodes: {error.message}") from None
    check_certificate(options)
    Proxy(options, tell).run(bind(options))


class Proxy(uvicorn.Server):
    """tell: is given the URL once connections are taken."""

    def __init__(self, options: ProxyOptions, tell: Callable[[str], None] = lambda url: None) -> None:
        self._options, self._tell = options, tell
        super().__init__(
            uvicorn.Config(
                create_proxy(options),
                http=Http10,
                log_level="warning",
                access_log=False,
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                timeout_graceful_shutdown=_GRACE,
                lifespan="on",
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's interface: starts to listen."""
        release(sockets or ())
        await super().startup(sockets)
        if self.started:
            port = self._options.server_port or self.servers[0].sockets[0].getsockname()[1]
            self._tell(url_of(self._options, port, local=True))
