from types import SimpleNamespace

import openai
import pytest

from lmdeploy_jax import JaxEngineConfig, pipeline
from tests.engine.harness import config
from tests.engine.test_images import save
from tests.server.browser import Actor, launched, opened
from tests.server.live import serving
from tests.server.scripted import scripted


@pytest.fixture(scope="package")
def pipe(tmp_path_factory):
    config = JaxEngineConfig(
        dtype="float32",
        session_len=512,
        max_batch_size=8,
        max_prefill_token_num=96,
        cache_max_entry_count=8e6,
        eager_mode=True,
        compile_cache_dir=str(tmp_path_factory.mktemp("xla")),
    )
    with pipeline("tiny-chat", config, progress=False) as pipe:
        yield pipe


@pytest.fixture(scope="package")
def live(pipe):
    """The server that most tests share."""
    with serving(pipe.frontend) as live:
        yield live


@pytest.fixture(scope="package")
def client(live):
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def aclient(live):
    return openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="package")
def seeing(tmp_path_factory):
    """A tiny random InternVL, whose words are w0, w1, ..."""
    folder = save("internvl_hf", tmp_path_factory.mktemp("seeing"))
    with pipeline(folder, config(tmp_path_factory.mktemp("xla")), progress=False) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skipped where there is none. Its driver runs an event loop in this thread,
    beside which other modules' tests could not start their own.
    """
    with launched() as browser:
        yield browser


@pytest.fixture(scope="package")
def stage():
    """A server whose model says what the chat page's tests want to see."""
    actor = Actor()
    with scripted(actor, session_len=2048) as (frontend, engine), serving(frontend) as live:
        yield SimpleNamespace(actor=actor, engine=engine, url=live.url, frontend=frontend)


@pytest.fixture
def page(browser, stage):
    """The chat page on that server."""
    with opened(browser, stage.url) as page:
        yield page
