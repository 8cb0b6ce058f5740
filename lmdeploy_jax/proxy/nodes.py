"""The servers behind a proxy, and which of them gets a request."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

from lmdeploy_jax.proxy.options import Strategy
from lmdeploy_jax.server.errors import ApiError

STRIKES = 3  # looks at a node's health, or requests, that fail in a row before it is left out
OBSERVED = 15  # requests that an observed latency is the mean of
HYBRID = 1  # LMDeploy's number for a node that does prefill and decode
# Unfinished requests that a node may have before a prefix goes elsewhere: times the mean, and beyond that. A
# few more cost a node little; without them, chance alone would move conversations where few are under way.
_BOUND, _SPARE = 1.25, 8


@dataclass(eq=False)
class Node:
    """A server. `latencies`: seconds of the last requests; `failures`: in a row."""

    url: str
    models: tuple[str, ...]
    speed: float | None = None
    unfinished: int = 0
    failures: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=OBSERVED))

    @property
    def well(self) -> bool:
        return self.failures < STRIKES

    @property
    def status(self) -> dict[str, Any]:
        """As `/nodes/status` tells it, in LMDeploy's words."""
        return {
            "role": HYBRID,
            "models": list(self.models),
            "unfinished": self.unfinished,
            "latency": list(self.latencies),
            "speed": self.speed,
            "healthy": self.well,
        }

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts a request while it runs."""
        self.unfinished += 1
        try:
            yield
        finally:
            self.unfinished -= 1

    def answered(self, seconds: float) -> None:
        """It has done a request in that time."""
        self.latencies.append(seconds)
        self.failures = 0


class Nodes:
    """All of them by URL."""

    def __init__(self, strategy: Strategy) -> None:
        self._nodes: dict[str, Node] = {}
        self._order = _ORDERS[strategy]

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def add(self, url: str, models: tuple[str, ...], speed: float | None = None) -> Node:
        """Take a node in, or learn what it serves now. A server that registers again and again tells neither
        its speed nor that it is well.
        """
        node = self._nodes.setdefault(url, Node(url, models))
        node.models, node.speed = models, node.speed if speed is None else speed
        return node

    def remove(self, url: str) -> None:
        """Forget a node; requests that run there go on. Raises ApiError (404) for an unknown one."""
        if self._nodes.pop(url, None) is None:
            known = ", ".join(self._nodes) or "none"
            raise ApiError(404, f"There is no node {url!r}. Nodes: {known}.", param="url")

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(name for node in self for name in node.models if node.well))

    def candidates(self, model: str | None) -> list[Node]:
        """Those that serve the model, or all where none is named. Raises ApiError where nothing can."""
        if not self._nodes:
            raise ApiError(503, "The proxy has no nodes yet: add one by POST /nodes/add.")
        serving = [node for node in self if model is None or model in node.models]
        if not serving:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"The model {model!r} does not exist. Models: {known}.",
                param="model",
                code="model_not_found",
            )
        well = [node for node in serving if node.well]
        if not well:
            urls = ", ".join(node.url for node in serving)
            raise ApiError(503, f"None of the model's nodes answers at present: {urls}.")
        return well

    def best(self, nodes: Collection[Node], prefix: bytes) -> Node:
        """The one that is to get a request whose conversation begins with `prefix`."""
        return self._order(list(nodes), prefix)


def checked_url(url: object) -> str:
    """A node's address without a path. Raises ApiError (400) for what is none."""
    parts = urlsplit(url) if isinstance(url, str) else None
    try:
        valid = (
            parts is not None
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ValueError:
        valid = False
    if (
        not valid
        or parts is None
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ApiError(
            400, f"url={url!r} is no node's address: give one like http://10.0.0.5:23333.", param="url"
        )
    return f"{parts.scheme}://{parts.netloc}"


def _random(nodes: list[Node], prefix: bytes) -> Node:
    return random.choices(nodes, [node.speed or 1.0 for node in nodes])[0]


def _expected(nodes: list[Node], prefix: bytes) -> Node:
    return min(_shuffled(nodes), key=lambda node: node.unfinished / (node.speed or 1.0))


def _observed(nodes: list[Node], prefix: bytes) -> Node:
    """One that has not been tried comes first."""
    return min(_shuffled(nodes), key=lambda node: sum(node.latencies) / max(len(node.latencies), 1))


def by_prefix(nodes: list[Node], prefix: bytes) -> Node:
    """Rendezvous hashing with bounded loads: nodes that come or go move only their own conversations."""
    most = math.ceil(_BOUND * (sum(node.unfinished for node in nodes) + 1) / len(nodes)) + _SPARE

    def rank(node: Node) -> tuple[bool, bytes]:
        return node.unfinished >= most, blake2b(prefix + node.url.encode(), digest_size=8).digest()

    return min(nodes, key=rank)


def _shuffled(nodes: list[Node]) -> list[Node]:
    """So that equals share."""
    return random.sample(nodes, len(nodes))


_ORDERS: Mapping[Strategy, Callable[[list[Node], bytes], Node]] = {
    "random": _random,
    "min_expected_latency": _expected,
    "min_observed_latency": _observed,
    "prefix": by_prefix,
}
