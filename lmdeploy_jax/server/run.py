"""A server process: uvicorn over the application, and an end without torn answers."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from lmdeploy_jax.server.app import create_app
from lmdeploy_jax.server.service import Service

_GRACE = 5.0  # seconds after the deadline in which answers that were cut still reach their clients


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then takes in nothing more, and cuts what runs beyond the deadline."""

    def __init__(self, service: Service) -> None:
        options = service.options
        self.service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=options.server_name,
                port=options.server_port,
                log_level="warning",
                access_log=False,
                ssl_keyfile=options.ssl_keyfile,
                ssl_certfile=options.ssl_certfile,
                timeout_graceful_shutdown=int(options.drain_seconds + _GRACE),
                lifespan="off",
            )
        )

    @property
    def address(self) -> str:
        """The URL that the server was told to listen at."""
        scheme = "https" if self.service.options.ssl_certfile else "http"
        return f"{scheme}://{self.service.options.server_name}:{self.service.options.server_port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Part of uvicorn's interface: called when the server is to end."""
        self.service.drain()
        deadline = asyncio.get_running_loop().call_later(self.service.options.drain_seconds, self.service.cut)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()
