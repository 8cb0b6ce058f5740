"""Conversations over several replicas find their cached pages, whatever shares them out."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.engine.process.replicas import open_remote
from tests.conversations import share_cached
from tests.engine.harness import config
from tests.patience import get, wait_until
from tests.proxy.test_proxy import proxied
from tests.server.live import serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of compiled programs."""
    return tmp_path_factory.mktemp("programs")


def served(stack: ExitStack, options: JaxEngineConfig) -> str:
    """The URL of a server whose engine is in processes of its own."""
    prepared = prepare("tiny-chat", options)
    engine = open_remote(prepared.folder, options, progress=False)
    stack.callback(engine.close)
    return stack.enter_context(serving(Frontend.from_engine(engine, prepared))).url


SIZES = {"max_batch_size": 32, "max_prefill_token_num": 256, "session_len": 1536}


@pytest.mark.full
def test_conversations_over_two_copies_are_cached(folder):
    with ExitStack() as stack:
        url = served(stack, config(folder, dp=2, **SIZES))
        assert share_cached(url) >= 0.95


@pytest.mark.full
def test_conversations_through_the_proxy_are_cached(folder):
    with ExitStack() as stack:
        nodes = [served(stack, config(folder, **SIZES)) for _ in range(2)]
        url = stack.enter_context(proxied(routing_strategy="prefix", nodes=nodes, health_interval=0.2))
        wait_until(lambda: get(url + "/health").json()["nodes"] == 2)
        assert share_cached(url) >= 0.95
