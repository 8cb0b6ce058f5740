"""What the engine's process tells the server's, and how often."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmdeploy_jax.cache.layout import CacheGroup, CacheLayout
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.facts import EngineFacts, EngineStats, Startup
from lmdeploy_jax.engine.process.wire import Update, unpacked
from lmdeploy_jax.engine.process.worker import Outbox
from lmdeploy_jax.engine.request import StepOutput

STEPS, PAUSE = 60, 0.002


class Sent(list):
    def send_bytes(self, message: bytes) -> None:
        self.append(pickle.loads(message))


def told(*, on_cpu: bool, running: int) -> list[Update]:
    """The messages about two answers that get a token every PAUSE seconds."""
    startup = Startup("scripted", 0, 0.0, 0.0)
    model, layout = SimpleNamespace(vocab_size=9, judges_only=False), CacheLayout((CacheGroup(),), (), ())
    facts = EngineFacts(Path(), JaxEngineConfig(), model, 64, 64, 7, layout, startup, on_cpu)
    engine = SimpleNamespace(
        facts=facts, stats=EngineStats(running=running), sleeping=False, failure=None, on_step=None
    )
    sent = Sent()
    outbox = Outbox(engine, sent)
    for step in range(STEPS):
        for request_id in (1, 2):
            outbox.put(StepOutput(request_id, 0, [step], finish_reason="stop" if step == STEPS - 1 else None))
        time.sleep(PAUSE)
    outbox.close()
    return [news for news in sent[1:] if news.outputs]


@pytest.mark.parametrize(("on_cpu", "running"), [(True, 40), (True, 1), (False, 40)])
def test_every_token_is_told_in_order_and_each_message_has_an_answer_once(on_cpu, running):
    tokens: dict[int, list[int]] = {1: [], 2: []}
    reasons = {}
    for news in told(on_cpu=on_cpu, running=running):
        outputs = [unpacked(sent) for sent in news.outputs]
        assert len({out.request_id for out in outputs}) == len(outputs)
        for out in outputs:
            tokens[out.request_id] += out.token_ids
            reasons[out.request_id] = out.finish_reason
    assert tokens == {1: list(range(STEPS)), 2: list(range(STEPS))}
    assert reasons == {1: "stop", 2: "stop"}


def test_on_a_cpu_many_running_sequences_are_told_of_seldom():
    begun = time.monotonic()
    messages = len(told(on_cpu=True, running=40))
    assert messages <= (time.monotonic() - begun) / 0.04 + 2
    assert len(told(on_cpu=False, running=40)) > STEPS / 4
