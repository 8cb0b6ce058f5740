"""The server's options are checked by their annotations, as the other configs are."""

from __future__ import annotations

import pytest

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.server.options import ServerOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server_port", -1),
        ("server_port", 65536),
        ("server_port", "80"),
        ("strict", "no"),
        ("api_keys", "one text"),
        ("api_keys", [1]),
        ("max_concurrent_requests", 0),
        ("max_queued_requests", -1),
        ("max_body_size", 0),
        ("body_timeout", -1.0),
        ("drain_seconds", float("nan")),
        ("request_timeout", "30"),
        ("ssl_certfile", "without-a-key.pem"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        ServerOptions(**{name: value})


def test_what_fits_is_taken():
    options = ServerOptions(api_keys=["a"], max_queued_requests=0, request_timeout=1, server_port=0)
    assert list(options.api_keys) == ["a"]
