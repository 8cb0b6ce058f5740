"""What can be set about the server. The command line has one flag for each field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from lmdeploy_jax.checked import POSITIVE, Checked, at_least, within
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.vision.access import MediaAccess

DEFAULT_PORT = 23333


def option(default: Any, text: str) -> Any:
    """A field with what its flag's help says."""
    return field(default=default, metadata={"help": text})


def check_pair(keyfile: str | None, certfile: str | None) -> None:
    """Raises ConfigError for a key without its certificate, and the other way round."""
    if (keyfile is None) != (certfile is None):
        raise ConfigError("ssl_keyfile and ssl_certfile go together: give both, or neither.")


@dataclass
class ServerOptions(Checked):
    """Raises `ConfigError` for a value that cannot work. The fields' meanings stand in their `help`."""

    server_name: str = option("0.0.0.0", "address to listen on")
    server_port: Annotated[int, within(0, 65535)] = option(DEFAULT_PORT, "port to listen on")
    model_name: str | None = option(None, "name in /v1/models; without it the model's path")
    api_keys: Sequence[str] = option((), "keys of which a client must send one")
    allow_origins: Sequence[str] = option(("*",), "origins that browsers may call from (CORS)")
    allow_methods: Sequence[str] = option(("*",), "methods that browsers may use (CORS)")
    allow_headers: Sequence[str] = option(("*",), "headers that browsers may send (CORS)")
    allow_credentials: bool = option(False, "let browsers send credentials (CORS)")
    ssl_keyfile: str | None = option(None, "private key; with --ssl-certfile the server speaks HTTPS")
    ssl_certfile: str | None = option(None, "certificate of the server")
    max_concurrent_requests: Annotated[int, at_least(1)] | None = option(
        None, "most requests worked on at once; others wait"
    )
    max_queued_requests: Annotated[int, at_least(0)] | None = option(
        None, "most answers that wait for the engine; a request beyond is told to come back later (429)"
    )
    max_body_size: Annotated[int, at_least(1)] | None = option(
        None, "most bytes of a request's body; without it 16 MB, or 64 MB where the model takes images"
    )
    body_timeout: Annotated[float, at_least(0)] = option(
        60.0, "seconds in which a request's body must have come (408)"
    )
    request_timeout: Annotated[float, at_least(0)] | None = option(
        None, "seconds after which a request is given up (504)"
    )
    drain_seconds: Annotated[float, at_least(0)] = option(
        30.0, "seconds that running answers may go on after SIGTERM"
    )
    generation_config: str = option(
        "auto", "sampling defaults: auto is the checkpoint's, lmdeploy the library's, else a folder"
    )
    tool_call_parser: str | None = option(
        "auto", "format of tool calls; auto goes by the chat template, none leaves them in the text"
    )
    reasoning_parser: str | None = option(
        "auto", "format of reasoning; auto goes by the chat template, none leaves it in the text"
    )
    strict: bool = option(False, "refuse request fields that are not known instead of ignoring them")
    allowed_media_domains: Sequence[str] = option(
        (), "the only hosts that images are fetched from, private ones too; without it any public host"
    )
    allowed_local_media_path: str | None = option(
        None, "folder whose files clients may name as images; without it they may name none"
    )
    image_fetch_timeout: Annotated[float, POSITIVE] = option(
        10.0, "seconds in which the images of a request must have come from their hosts"
    )
    proxy_url: str | None = option(None, "a proxy (serve proxy) to be a node of, as long as the server runs")
    disable_fastapi_docs: bool = option(False, "leave out /docs and /openapi.json")
    disable_metrics: bool = option(False, "leave out /metrics")
    allow_terminate_by_client: bool = option(False, "let clients end the server by GET /terminate")
    enable_abort_handling: bool = option(False, "let clients end requests by POST /abort_request")

    def __post_init__(self) -> None:
        check_pair(self.ssl_keyfile, self.ssl_certfile)

    @property
    def media_access(self) -> MediaAccess:
        """What the images of requests may be loaded from."""
        return MediaAccess(
            trusted=False,
            allowed_media_domains=tuple(host.lower() for host in self.allowed_media_domains) or None,
            allowed_local_media_path=self.allowed_local_media_path,
            fetch_timeout=self.image_fetch_timeout,
        )
