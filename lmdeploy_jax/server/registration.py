"""A server as a node of a proxy: it says where it is again and again, since a proxy may start anew."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

from lmdeploy_jax.logs import logger
from lmdeploy_jax.server.http.sockets import ANY
from lmdeploy_jax.server.options import ServerOptions

INTERVAL = 20.0  # seconds
_TIMEOUT = 5.0  # seconds for the proxy's answer


class Registration:
    """Tells the proxy of `url` in a thread of its own until it is closed, and then that it has gone."""

    def __init__(self, options: ServerOptions, url: str, models: Sequence[str]) -> None:
        assert options.proxy_url is not None
        self._proxy = options.proxy_url.rstrip("/")
        self._node = {"url": reachable(url, self._proxy), "status": {"models": list(models)}}
        key = next(iter(options.api_keys), None)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmdeploy_jax registration", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns once the proxy knows, or cannot be told."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        known = False
        while not self._closed.is_set():
            known = self._told("add", self._node)
            self._closed.wait(INTERVAL)
        if known:
            self._told("remove", {"url": self._node["url"]})

    def _told(self, what: str, body: object) -> bool:
        """Whether it was heard."""
        try:
            url = f"{self._proxy}/nodes/{what}"
            answer = httpx.post(url, json=body, headers=self._headers, timeout=_TIMEOUT, trust_env=False)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            logger.error("the proxy %s cannot be told of this server: %s", self._proxy, error)
            return False
        return True


def reachable(url: str, proxy: str) -> str:
    """The URL with an address that the proxy can reach, where the server listens at every one."""
    parts, there = urlsplit(url), urlsplit(proxy)
    if (parts.hostname or "") not in ANY:
        return url
    host = "127.0.0.1"
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((there.hostname or host, there.port or 80))  # sends nothing: asks for the way there
        host = probe.getsockname()[0]
    return f"{parts.scheme}://{host}:{parts.port}"
