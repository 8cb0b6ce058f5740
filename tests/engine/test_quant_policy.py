"""A quantised KV cache: every path gives the tokens of the plain one over such a cache, whose memory plan
says what is gained; models that cannot have one are refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cache.kinds import PageKind
from lmdeploy_jax.cache.kv import CacheSpec, gain, page_bytes
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.decoder_config import decoder_config, with_quant_policy
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import DecoderConfig, LatentConfig, RopeConfig
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.pallas_kernels.options import AttentionOptions
from lmdeploy_jax.parallel.mesh import make_mesh
from tests.devices import virtual_devices
from tests.engine.harness import generate, tokens
from tests.engine.test_equality import SHARDED
from tests.engine.test_setup import MODEL
from tests.oracle import save_checkpoint
from tests.patience import PATIENCE

# Every policy of one family; then windows and soft caps of their own, states beside the pages, sinks.
CACHES = [
    ("llama", 8),
    *(
        pytest.param(pair, marks=pytest.mark.full)
        for pair in (
            ("llama", 4),
            ("llama", 16),
            ("llama", 17),
            ("gemma3", 4),
            ("gemma3", 17),
            ("qwen3_next", 8),
            ("gpt_oss", 4),
            ("gpt_oss", 16),
        )
    ),
]


def _named(pair):
    return "-".join(map(str, pair))


@pytest.fixture(scope="module", params=CACHES, ids=_named)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def policy(case):
    return case[1]


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    return save_checkpoint(case[0], tmp_path_factory.mktemp("quant_policy") / case[0])


def test_every_path_gives_the_plain_one_s_tokens(start, policy, folder, prompts):
    """Each prompt by itself, in one piece; then together, from the cache, forked."""
    engine = start(quant_policy=policy, max_prefill_token_num=256)
    alone = [tokens(engine, [prompt])[0] for prompt in prompts]
    assert tokens(engine, [prompt[::-1] for prompt in prompts] + prompts)[-len(prompts) :] == alone
    hit = generate(engine, prompts[-1:], n=2)[0]
    assert [result.tokens for result in hit] == alone[-1:] * 2
    assert hit[0].last.cached_tokens == 192
    assert len({tuple(answer) for answer in alone}) == len(prompts)


@pytest.mark.full
def test_in_chunks_and_preempted(start, policy, folder, prompts):
    engine = start(quant_policy=policy, max_prefill_token_num=256)
    alone = [tokens(engine, [prompt])[0] for prompt in prompts]
    layout = engine.facts.cache_layout
    pages, size = 5 * len(layout.groups) + 1, page_bytes(layout.paged, "float32")
    changes = {"max_prefill_token_num": 16, "decode_steps": 3, "enable_prefix_caching": False}
    small = start(quant_policy=policy, cache_max_entry_count=pages * size, session_len=256, **changes)
    assert small.memory.num_pages == pages
    assert tokens(small, prompts[1:] * 2) == alone[1:] * 2
    assert small.scheduler.preemptions or len(layout.groups) > 1


@pytest.mark.parametrize(("head_dim", "least"), [(128, 1.9), (64, 1.85)])
def test_the_memory_plan_says_how_many_more_tokens_there_are(head_dim: int, least: float) -> None:
    model = _with(head_dim)
    plain = _paged(model)
    assert gain(plain, "bfloat16") == 1
    for policy, times in ((8, least), (16, least), (17, least), (4, 3.5)):
        arrays = _paged(with_quant_policy(model, policy))
        assert gain(arrays, "bfloat16") >= times
        assert page_bytes(arrays, "bfloat16") * times <= page_bytes(plain, "bfloat16")


@pytest.mark.parametrize("policy", [0, 4, 8, 16])
def test_the_arrays_take_what_the_plan_says(policy: int) -> None:
    model = with_quant_policy(_with(64), policy)
    layout = model.cache_layout(1, session_len=256, step_tokens=64)
    arrays = jax.tree.leaves(CacheSpec(layout, 3, jnp.dtype("bfloat16"), make_mesh(1)).specs)
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    assert size == 3 * page_bytes(layout.paged, "bfloat16")


def test_what_cannot_have_one_is_refused_by_name() -> None:
    latent = LatentConfig(3, 24, 16, 8, 16, AttentionOptions(0.2), RopeConfig(8))
    layer = MODEL.layers[0]
    with pytest.raises(ConfigError, match=r"quant_policy=8 \(int8\).*latents, no keys and values\. Leave"):
        with_quant_policy(replace(MODEL, layers=(replace(layer, mixer=latent),)), 8)
    with pytest.raises(
        ConfigError, match=r"quant_policy=4 \(int4\).*66 elements of a head do not fill words"
    ):
        with_quant_policy(_with(66), 4)
    with pytest.raises(ConfigError, match=r"quant_policy=42 is invalid.*TurboQuant, is not implemented"):
        JaxEngineConfig(quant_policy=42)


def test_heads_that_the_kernels_cannot_read_attend_through_xla() -> None:
    """Those that fill no power of two of words, or too few for a product of the kernels."""
    kernels = Kernels("pallas")
    for head_dim, backend in ((128, "pallas"), (80, "xla"), (16, "xla")):
        mixer = with_quant_policy(_with(head_dim), 8).layers[0].mixer
        assert kernels.mixer_backend(mixer) == backend


def _with(head_dim: int) -> DecoderConfig:
    mixer = MODEL.layers[0].mixer
    layer = replace(MODEL.layers[0], mixer=replace(mixer, head_dim=head_dim))
    return replace(MODEL, layers=(layer,) * 2)


def _paged(model: DecoderConfig) -> tuple[PageKind, ...]:
    return model.cache_layout(1, session_len=256, step_tokens=64).paged


@pytest.mark.full
@pytest.mark.parametrize("case", [("llama", 8), ("llama", 4)], indirect=True, ids=_named)
def test_tensor_parallel_devices_give_the_same_tokens(start, policy, folder, compile_cache, prompts):
    """tp 2 and 4 on virtual devices; bytes of FP8 are cut as those of int8 are, words of int4 otherwise."""
    expected = tokens(start(quant_policy=policy), prompts)
    argument = json.dumps([str(folder), str(compile_cache), prompts, [2, 4]])
    code = SHARDED.replace("tp=tp", f"tp=tp, quant_policy={policy}")
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(
        command, env=virtual_devices(4), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("tokens")]
    assert lines == [expected] * 2, done.stderr[-2000:]


def test_what_int4_costs_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    config = JaxEngineConfig(quant_policy=4)
    prepare("tiny-chat", config)
    decoder_config(TINY_CHAT, config)  # as the engine reads it once more
    assert caplog.text.count("8 is safe") == 1
