"""A server in this process, on a port of its own, for tests that speak HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.server.run import Server
from lmdeploy_jax.server.service import Service
from tests.patience import PATIENCE, wait_until


class LiveServer:
    """`url`, the service behind it, and `call` for what must happen on its event loop."""

    def __init__(self, frontend: Frontend, **options: object) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        settings = ServerOptions(server_name="127.0.0.1", server_port=port, **options)
        self.service = Service(frontend, settings, "tiny-chat")
        self.server = Server(self.service)
        self.url = f"http://127.0.0.1:{port}"
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.server.serve())

    def start(self) -> None:
        self.thread.start()
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def serving(frontend: Frontend, **options: object) -> Iterator[LiveServer]:
    live = LiveServer(frontend, **options)
    live.start()
    try:
        yield live
    finally:
        live.stop()


def begun(url: str, length: int) -> bytes:
    """The first line of the answer to a request whose body is to have so many bytes, of which one comes."""
    parts = urlsplit(url)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((parts.hostname, parts.port), PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {length}\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(4096).partition(b"\r\n")[0]
