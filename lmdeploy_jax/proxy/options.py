"""What can be set about the proxy. The command line has one flag for each field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lmdeploy_jax.checked import POSITIVE, Checked, at_least, within
from lmdeploy_jax.server.options import check_pair, option

# LMDeploy's three, and one of prefixes.
Strategy = Literal["random", "min_expected_latency", "min_observed_latency", "prefix"]


@dataclass
class ProxyOptions(Checked):
    """Raises `ConfigError` for a value that cannot work. The fields' meanings stand in their `help`."""

    server_name: str = option("0.0.0.0", "address to listen on")
    server_port: Annotated[int, within(0, 65535)] = option(8000, "port to listen on")
    nodes: Sequence[str] = option((), "URLs of servers; others are added by POST /nodes/add")
    routing_strategy: Strategy = option(  # noqa: RUF009
        "min_expected_latency",
        "random (by speed), min_expected_latency (unfinished requests by speed), min_observed_latency (of "
        "the last 15 requests), prefix (conversations stay where their cached pages are)",
    )
    api_keys: Sequence[str] = option((), "keys of which a client must send one; it is passed on to the nodes")
    allow_origins: Sequence[str] = option(("*",), "origins that browsers may call from (CORS)")
    allow_methods: Sequence[str] = option(("*",), "methods that browsers may use (CORS)")
    allow_headers: Sequence[str] = option(("*",), "headers that browsers may send (CORS)")
    allow_credentials: bool = option(False, "let browsers send credentials (CORS)")
    ssl_keyfile: str | None = option(None, "private key; with --ssl-certfile the proxy speaks HTTPS")
    ssl_certfile: str | None = option(None, "certificate of the proxy")
    health_interval: Annotated[float, POSITIVE] = option(
        10.0,
        "seconds between looks at each node's /health; one that fails three gets nothing until it is well",
    )
    connect_timeout: Annotated[float, POSITIVE] = option(
        5.0, "seconds in which a node must take a connection"
    )
    max_body_size: Annotated[int, at_least(1)] = option(64 << 20, "most bytes of a request's body")

    def __post_init__(self) -> None:
        check_pair(self.ssl_keyfile, self.ssl_certfile)
