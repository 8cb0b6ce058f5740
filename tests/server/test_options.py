"""The server's options are checked by their annotations, as the other configs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.server.options import ServerOptions
from lmdeploy_jax.vision.access import MediaAccess


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
        ("allowed_media_domains", "one.example"),
        ("image_fetch_timeout", 0.0),
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


def test_what_images_may_be_loaded_from():
    assert ServerOptions().media_access == MediaAccess(trusted=False)
    options = ServerOptions(allowed_media_domains=["A.Example"], allowed_local_media_path="/a")
    access = options.media_access
    assert (access.trusted, access.names("a.example"), access.names("b.example")) == (False, True, False)
    assert (access.allows(Path("/a/b.png")), access.allows(Path("/b.png"))) == (True, False)
