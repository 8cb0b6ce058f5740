import random

import pytest

from lmdeploy_jax.engine.core.engine import Engine
from tests.engine.harness import config
from tests.oracle import hf_greedy, save_checkpoint

LENGTHS = (1, 63, 64, 65, 200)  # around a page, and beyond one chunk
COUNT = 32


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="session")
def prompts():
    rnd = random.Random(0)
    return [[rnd.randrange(3, 257) for _ in range(n)] for n in LENGTHS]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_checkpoint("llama", tmp_path_factory.mktemp("engine") / "llama")


@pytest.fixture(scope="session")
def expected(llama, prompts):
    """What transformers answers to `prompts`."""
    return [hf_greedy(llama, prompt, COUNT) for prompt in prompts]


@pytest.fixture(scope="session")
def engine(llama, compile_cache):
    """The plain engine that most tests share."""
    engine = Engine(llama, config(compile_cache), progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def answers(folder, prompts):
    """What transformers answers to `prompts` with the checkpoint `folder` of a module."""
    return [hf_greedy(folder, prompt, COUNT) for prompt in prompts]


@pytest.fixture
def start(folder, compile_cache):
    """Opens engines on that checkpoint, and closes them."""
    opened = []

    def start(**changes) -> Engine:
        opened.append(Engine(folder, config(compile_cache, **changes), progress=False))
        return opened[-1]

    yield start
    for engine in opened:
        engine.scheduler.check_integrity()
        engine.close()
