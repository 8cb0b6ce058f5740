"""Pipelines over scripted engines, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmdeploy_jax import Pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.request import Request
from lmdeploy_jax.text.chat_template import select
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.fake_engine import FakeEngine, Script

TOKENIZER = Tokenizer(TINY_CHAT)
ENDLESS = TOKENIZER.encode(" and") * 1000
RAW = {"do_preprocess": False}
Opener = Callable[..., tuple[Pipeline, FakeEngine]]


def ids(text: str, *, stop: bool = True) -> list[int]:
    """Tokens of a text, ended by the model's stop token."""
    return TOKENIZER.encode(text) + ([TOKENIZER.eos_token_id] if stop else [])


def echo(request: Request, index: int) -> list[int]:
    """Says the prompt again, and which of n answers it is."""
    return [*request.prompt.ids, *ids(f" #{index}")]


def endless(request: Request, index: int) -> list[int]:
    """Goes on to the end of the context."""
    return ENDLESS


@contextmanager
def opener() -> Iterator[Opener]:
    """Opens pipelines over scripts; they are closed at the end."""
    pipes: list[Pipeline] = []

    def open_pipe(script: Script, **sizes: int) -> tuple[Pipeline, FakeEngine]:
        engine = FakeEngine(TINY_CHAT, script, **sizes)
        pipes.append(Pipeline.from_frontend(Frontend(engine, TOKENIZER, select(TOKENIZER, TINY_CHAT))))
        return pipes[-1], engine

    yield open_pipe
    for pipe in pipes:
        pipe.close()
