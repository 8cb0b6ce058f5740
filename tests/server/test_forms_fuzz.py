"""Random forms, good and bad: the good ones are answered with the form, nothing dies of the others."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.process.remote import RemoteEngine
from tests.fuzz import cases, drawn
from tests.patience import PATIENCE, wait_until
from tests.server.forms import CASES, Case
from tests.server.live import serving

AT_ONCE = 10
ASK = {
    "messages": [{"role": "user", "content": "Say something."}],
    "temperature": 1.0,
    "max_tokens": 120,
    "chat_template_kwargs": {"enable_thinking": False},
}


async def answered(http: httpx.AsyncClient, case: Case, seed: int, told: Counter[str]) -> None:
    """Send a case and look at the answer; counts what it was."""
    answer = await http.post("/v1/chat/completions", json=ASK | {"seed": seed} | case.body)
    if case.check is None:
        assert answer.status_code in (200, 400, 503), (case.body, answer.text)
        told["wrong"] += 1
        return
    assert answer.status_code == 200, (case.body, answer.text)
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] in ("stop", "tool_calls"):
        case.check(choice["message"])
        told["form"] += 1
    else:
        assert choice["finish_reason"] == "length", (case.body, choice)
        told["cut"] += 1


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A server whose engine has a process of its own, as `serve` has it."""
    config = JaxEngineConfig(
        session_len=512,
        max_batch_size=8,
        max_prefill_token_num=96,
        cache_max_entry_count=8e6,
        eager_mode=True,
        compile_cache_dir=str(tmp_path_factory.mktemp("xla")),
    )
    frontend = Frontend.from_engine(RemoteEngine(TINY_CHAT, config, progress=False))
    with serving(frontend) as live:
        yield live
    frontend.close()


@cases(2000)
def test_good_forms_are_answered_and_bad_ones_do_no_harm(apart, cases):
    told: Counter[str] = Counter()

    async def send(batch: list[Case]) -> None:
        async with (
            httpx.AsyncClient(base_url=apart.url, timeout=PATIENCE) as http,
            asyncio.TaskGroup() as group,
        ):
            for i, case in enumerate(batch):
                group.create_task(answered(http, case, i, told))

    @settings(drawn(cases // AT_ONCE), phases=[Phase.generate])  # a batch of ten shrinks for minutes
    @given(st.lists(CASES, min_size=AT_ONCE, max_size=AT_ONCE))
    def fuzz(batch: list[Case]) -> None:
        asyncio.run(send(batch))

    fuzz()
    assert told["form"] >= told.total() / 2, told
    engine = apart.service.frontend.engine
    wait_until(lambda: not (apart.service.running or engine.stats.running or engine.stats.pages_used))
    assert engine.failure is None
