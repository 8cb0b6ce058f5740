"""A request's way from its route to the engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from lmdeploy_jax import GenerationConfig
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.server.chat.call import ChatCall
from lmdeploy_jax.server.service import Service
from lmdeploy_jax.text.chat_template import select
from lmdeploy_jax.text.prompts import Prompt
from tests.fake_engine import FakeEngine
from tests.scripted import TOKENIZER, endless
from tests.server.scripted import scripted

CONFIG = GenerationConfig(max_new_tokens=1)


class Watched(Frontend):
    """`done` tells the order of what it was asked for."""

    def encode(self, *args, **kwargs):
        self.done.append("encode")
        return super().encode(*args, **kwargs)

    def submit(self, *args, **kwargs):
        self.done.append("submit")
        return super().submit(*args, **kwargs)


def test_of_a_burst_the_first_is_with_the_engine_before_the_last_is_tokenised():
    frontend = Watched(FakeEngine(TINY_CHAT, endless), TOKENIZER, select(TOKENIZER, TINY_CHAT))
    frontend.done = []

    async def burst():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        service = Service(frontend)
        call = ChatCall(Prompt(text="hi"), CONFIG)
        for answers in await asyncio.gather(*(service.answer(call, stream=True) for _ in range(3))):
            answers.close()
        assert not service.running

    asyncio.run(burst())
    frontend.close()
    assert frontend.done == ["encode", "submit"] * 3


def test_what_was_given_up_before_it_was_submitted_never_reaches_the_engine():
    with scripted(endless) as (frontend, engine):

        async def given_up():
            service = Service(frontend)
            generation = service.admit(2)
            generation.close()
            await asyncio.to_thread(generation.submit_prompts, ["a", "b"], CONFIG, stream=True)
            assert not service.running

        asyncio.run(given_up())
        assert engine.seen == []
