"""Every family through the whole engine: whole, chunked, cached, preempted and beside strangers, the tokens are
transformers'. On several devices: tests/parallel/test_families.py.
"""

import pytest

from lmdeploy_jax.cache.kv import page_bytes
from lmdeploy_jax.converters.config import read_config
from tests.engine.harness import generate, tokens
from tests.oracle import CONFIGS, save_checkpoint

PAGES = 6  # too few for four prompts twice
pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


def test_chunked_and_cached_prompts_are_answered_as_transformers_does(start, folder, prompts, answers):
    engine = start()
    assert tokens(engine, prompts) == answers
    assert [result[0].tokens for result in generate(engine, prompts)] == answers


def test_whole_prompts_alone_and_preempted_ones_are_too(start, folder, prompts, answers):
    layout = read_config(folder).cache_layout(1, session_len=256, step_tokens=256)
    pool = PAGES * len(layout.groups) * page_bytes(layout.paged, "float32")
    engine = start(cache_max_entry_count=pool, session_len=256, max_prefill_token_num=256)
    assert tokens(engine, prompts[-1:]) == answers[-1:]
    assert tokens(engine, prompts[1:] * 2) == answers[1:] * 2
    assert engine.scheduler.preemptions
