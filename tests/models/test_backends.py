"""Layers whose heads the Pallas kernels cannot do attend through XLA, beside others that they do."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.converters.load import LoadedModel, build_skeleton
from lmdeploy_jax.models.config import AttentionConfig, DecoderConfig, LatentConfig, RopeConfig
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig, RouterConfig
from lmdeploy_jax.models.recurrent_config import DeltaConfig, Mamba2Config, ShortConvConfig
from lmdeploy_jax.models.tuning import UNTUNED, Tuning
from lmdeploy_jax.pallas_kernels.kv_formats import INT8
from lmdeploy_jax.pallas_kernels.options import PAGE_SIZE, AttentionOptions
from lmdeploy_jax.pallas_kernels.registry import MAX_GROUP
from tests.models.paged import PagedRunner
from tests.models.test_program import CONFIG

MIXERS = [
    AttentionConfig(heads, 1, 16, AttentionOptions(0.25), RopeConfig(16)) for heads in (4, MAX_GROUP + 1)
]
MIXED = replace(CONFIG, layers=tuple(replace(CONFIG.layers[0], mixer=mixer) for mixer in MIXERS))


def model(backend: str, config: DecoderConfig = MIXED, tuning: Tuning = UNTUNED) -> LoadedModel:
    skeleton = build_skeleton(config, jnp.dtype("float32"), Kernels(backend, tuning=tuning))
    keys = jax.random.split(jax.random.key(0), len(skeleton.specs))
    specs = zip(keys, skeleton.specs.values(), strict=True)
    leaves = tuple(0.2 * jax.random.normal(key, spec.shape, spec.dtype) for key, spec in specs)
    return LoadedModel(skeleton, leaves, jnp.dtype("float32"))


def test_each_kind_of_layer_has_its_own_backend():
    kernels = Kernels("pallas")
    assert [kernels.mixer_backend(mixer) for mixer in MIXERS] == ["pallas", "xla"]
    assert [Kernels("xla").mixer_backend(mixer) for mixer in MIXERS] == ["xla", "xla"]


def test_room_is_planned_for_pages_of_codes_that_prompts_read_widened():
    """K and V of the largest layer that attends through Mosaic, as many pages as `scratch_pages` says."""
    kernels = Kernels("pallas", tuning=Tuning(prefill_attention="mosaic"))
    plain = AttentionConfig(8, 2, 64, AttentionOptions(0.1), None)
    coded = replace(plain, kv_format=INT8)
    windowed = replace(coded, kv_heads=4, options=AttentionOptions(0.1, window=100))
    elements = kernels.scratch_elements
    assert elements([plain, coded, windowed], 4096, 1000) == 2 * 256 * PAGE_SIZE * 2 * 64
    assert elements([coded], 4096, 64 * 300 - 1) == 2 * 300 * PAGE_SIZE * 2 * 64
    assert elements([plain, windowed], 4096, 1000) == elements([coded], 1024, 1000) == 0
    assert Kernels("pallas").scratch_elements([coded], 4096, 1000) == 0


def test_layers_of_both_kinds_share_a_batch():
    _assert_backends_agree(MIXED)


def test_layers_may_differ_in_their_kv_heads():
    mixers = [AttentionConfig(4, kv, 16, AttentionOptions(0.25), RopeConfig(16)) for kv in (1, 2, 1)]
    layers = tuple(replace(CONFIG.layers[0], mixer=mixer) for mixer in mixers)
    _assert_backends_agree(replace(CONFIG, layers=layers))


def test_mixtures_of_both_backends_agree():
    """Their parts go to the next norm, or are added up, beside a shared block or before a norm; a few tokens'
    router is one kernel with the norm before it.
    """
    router, mlp = RouterConfig(6, 2, normalise=True), MlpConfig(24)
    plain = replace(MIXED.layers[0], mlp=MixtureConfig(router, mlp))
    biased = MixtureConfig(replace(router, bias=True), replace(mlp, activation="swigluoai", bias=True))
    shared = MixtureConfig(router, mlp, shared=MlpConfig(16), shared_gate=True)
    layers = (replace(plain, mlp=shared), replace(plain, mlp=biased, post_norm=True), plain)
    _assert_backends_agree(replace(CONFIG, layers=layers), Tuning(routing="pallas"))


def test_latent_attention_of_both_backends_agrees():
    """Chunks with products of XLA before it, then tokens with a kernel in their place."""
    mixer = LatentConfig(3, 24, 16, 8, 16, AttentionOptions(0.2), RopeConfig(8), query_rank=12)
    latent = replace(CONFIG, layers=(replace(CONFIG.layers[0], mixer=mixer),))
    _assert_backends_agree(latent, Tuning(latent_queries="pallas"))


@pytest.mark.full
def test_recurrences_of_both_backends_agree():
    mixers = (DeltaConfig(2, 4, 16, 12, 4), Mamba2Config(4, 2, 16, 12, 4), ShortConvConfig(4, 16, 3))
    layer = CONFIG.layers[0]
    recurrent = (replace(layer, mixer=mixer) for mixer in mixers)
    _assert_backends_agree(replace(CONFIG, layers=(layer, *recurrent)))


def _assert_backends_agree(config: DecoderConfig, tuning: Tuning = UNTUNED) -> None:
    """On a chunk that is longer than a tile of either backend, beside short ones, then a token each."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 150).tolist()
    found = []
    for backend in ("xla", "pallas_interpret"):
        runner = PagedRunner(model(backend, config, tuning))
        chunks = runner.ragged([(0, 0, ids[:140], 140), (1, 0, ids[:9], 9), (2, 0, ids[:1], 1)])
        decoded = runner.decode({0: (ids[140], 140), 1: (ids[9], 9)})
        found.append(np.concatenate([*chunks, *(logits[None] for logits in decoded.values())]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4 * np.abs(found[0]).max())
