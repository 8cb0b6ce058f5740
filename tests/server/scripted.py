"""Frontends over scripted engines, for servers that need no model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.text.chat_template import select
from tests.fake_engine import FakeEngine, Script
from tests.scripted import TOKENIZER


@contextmanager
def scripted(script: Script, **sizes: int) -> Iterator[tuple[Frontend, FakeEngine]]:
    engine = FakeEngine(TINY_CHAT, script, **sizes)
    frontend = Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT))
    try:
        yield frontend, engine
    finally:
        frontend.close()
