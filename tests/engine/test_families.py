"""Every family through the whole engine: whole, chunked, cached, preempted and beside strangers, tokens are
transformers'. On several devices: test_families.py of tests/parallel.
"""

import pytest

from lmdeploy_jax.cache.kv import page_bytes
from lmdeploy_jax.converters.config import read_config
from tests.engine.conftest import COUNT
from tests.engine.harness import generate, tokens
from tests.oracle import CONFIGS, hf_greedy, save_checkpoint

CHUNK, PAGES = 96, 7  # a cache group's, too few for all sequences at once
pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp("families") / request.param)


def test_a_family_answers_as_transformers_does_whatever_happens_beside(start, folder, prompts):
    """The first prompt is computed whole, the second in chunks, and both once more with what is cached."""
    asked = [prompts[1], prompts[-1]]
    assert len(asked[0]) < CHUNK < len(asked[1])
    answers = [hf_greedy(folder, prompt, COUNT) for prompt in asked]
    layout = read_config(folder).cache_layout(1, session_len=256, step_tokens=CHUNK)
    pool = PAGES * len(layout.groups) * page_bytes(layout.paged, "float32")
    engine = start(cache_max_entry_count=pool, session_len=256, max_prefill_token_num=CHUNK)
    for _ in range(2):
        assert [tokens(engine, [prompt])[0] for prompt in asked] == answers
    strangers = PAGES  # which begin with a page each, and grow beyond it
    together = generate(engine, asked[:1] * strangers + asked[1:])
    assert [result[0].tokens for result in together] == answers[:1] * strangers + answers[1:]
    # Layers with a window give pages back, so that a pool of several groups may suffice.
    assert engine.scheduler.preemptions or len(layout.groups) > 1
