"""Routing beyond what the families' configs show, and experts that are quantised."""

from __future__ import annotations

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.bench import checkpoint
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.models.mlp_config import MixtureConfig, MlpConfig, RouterConfig
from lmdeploy_jax.models.routing import Router, choose
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from tests.converters.formats.packers import mx
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import save_checkpoint

IDS = np.random.default_rng(0).integers(3, 257, 70).tolist()


def logits(model) -> np.ndarray:
    runner = PagedRunner(model)
    (prefill,) = runner.ragged([(0, 0, IDS[:-1], len(IDS))])
    return np.concatenate([prefill, runner.decode({0: (IDS[-1], len(IDS) - 1)})[0][None]])


def test_a_bias_changes_the_choice_and_not_the_weights():
    scores = jnp.array([[0.0, 1.0, 2.0, 3.0]])
    plain = choose(RouterConfig(4, 2, "sigmoid"), scores, None)
    moved = choose(RouterConfig(4, 2, "sigmoid", correction=True), scores, jnp.array([9.0, 0, 0, 0]))
    assert (plain.experts.tolist(), moved.experts.tolist()) == ([[3, 2]], [[0, 3]])
    np.testing.assert_allclose(moved.weights, [[0.5, 1 / (1 + np.exp(-3))]], rtol=1e-6)


def test_the_best_experts_of_other_groups_are_passed_over():
    logits = jnp.array([[5.0, -9, 3, 3, 1, 1, 0, 0]])
    two = choose(RouterConfig(8, 2, "sigmoid", groups=4, top_groups=1), logits, None)
    best = choose(RouterConfig(8, 2, groups=4, top_groups=1, group_score="max"), logits, None)
    assert (two.experts.tolist(), best.experts.tolist()) == ([[2, 3]], [[0, 1]])


def test_among_equals_the_lowest_goes_first():
    routes = choose(RouterConfig(6, 3, normalise=True, scale=2.0), jnp.zeros((2, 6)), None)
    assert routes.experts.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(routes.weights, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(("tokens", "shape"), [(3, (15, 3, 8)), (70, (70, 8))])
def test_logits_of_few_tokens_come_in_parts(tokens, shape):
    """Of a hidden size that no block of 128 divides."""
    rng, config = np.random.default_rng(0), RouterConfig(8, 2, normalise=True, bias=True)
    weight, bias, x = (rng.normal(size=shape) for shape in ((8, 960), (8,), (tokens, 960)))
    how = {"dtype": jnp.dtype("bfloat16")}
    kernels, plain = (Router(960, config, backend=name, **how) for name in ("pallas_interpret", "xla"))
    for router in (kernels, plain):
        router.weight[...], router.bias[...] = jnp.asarray(weight, "bfloat16"), jnp.asarray(bias, "float32")
    found, wanted = (router(jnp.asarray(x, "bfloat16")) for router in (kernels, plain))
    np.testing.assert_array_equal(found.experts, wanted.experts)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=1e-4)
    assert kernels.logits(jnp.asarray(x, "bfloat16")).shape == shape


def test_what_a_step_reads_of_experts_grows_with_its_tokens():
    mixture = MixtureConfig(RouterConfig(128, 8), MlpConfig(768))
    one, some, many = (mixture.weight_rows(n) - 128 for n in (1, 32, 4096))
    assert one == pytest.approx(8 * 3 * 768)
    assert some == pytest.approx(111.8 * 3 * 768, rel=1e-3)
    assert many == pytest.approx(128 * 3 * 768)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A checkpoint whose experts are in MXFP4, and one that holds what these stand for."""
    root = tmp_path_factory.mktemp("gpt_oss")
    plain = save_checkpoint("gpt_oss", root / "plain")
    packed = shutil.copytree(plain, root / "packed")
    tensors = load_file(plain / "model.safetensors")
    experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    quantised = {name: value for name, value in tensors.items() if name not in experts}
    for name in experts:
        count, inner, out = tensors[name].shape
        rows = tensors[name].swapaxes(1, 2).reshape(-1, inner)
        found, stands_for = mx(rows, "blocks", "scales", blocks=True)
        quantised[f"{name}_blocks"] = found["blocks"].reshape(count, out, inner // 32, 16)
        quantised[f"{name}_scales"] = found["scales"].reshape(count, out, inner // 32)
        tensors[name] = np.ascontiguousarray(stands_for.reshape(count, out, inner).swapaxes(1, 2))
    save_file(tensors, plain / "model.safetensors")
    save_file(quantised, packed / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return plain, packed


def test_experts_in_mxfp4_are_what_they_stand_for(gpt_oss):
    plain, packed = gpt_oss
    want = named_leaves(load_model(plain))
    widened = named_leaves(load_model(packed, dequantise=True))
    assert widened.keys() == want.keys()
    assert all(np.array_equal(widened[name], want[name]) for name in want)
    held = load_model(packed, dequantise=False)
    values = named_leaves(held)["layers.0.mlp.experts.gate_up.weight.values"]
    assert (values.shape, str(values.dtype)) == ((4, 2, 96, 16), "uint16")
    expected = logits(load_model(plain))
    np.testing.assert_allclose(logits(held), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("shape", "model_format"),
    [
        ("tiny-gpt-oss", "mxfp4"),
        pytest.param("tiny-qwen3-moe", "awq", marks=pytest.mark.full),
        pytest.param("tiny-qwen3-moe", "fp8", marks=pytest.mark.full),
    ],
)
def test_quantised_experts_of_both_backends_agree(shape, model_format, tmp_path):
    """In float32, so that one rounding more would be seen; with gpt-oss's biases and clamps."""
    folder = checkpoint.make(shape, tmp_path, model_format=model_format)
    how = {"dtype": "float32", "dequantise": False}
    kernels, plain = (load_model(folder, **how, backend=name) for name in ("pallas_interpret", "xla"))
    experts = kernels.merge(kernels.leaves).layers[0].mlp.experts
    assert isinstance(experts.gate_up.operand(), Quantised)
    assert isinstance(experts.down.operand(), Quantised)
    ours, theirs = (
        np.stack(list(PagedRunner(model).decode({0: (7, 0), 1: (8, 0)}).values()))
        for model in (kernels, plain)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_experts_that_are_quantised_as_they_are_read_stay_so_one_by_one(tmp_path):
    folder = save_checkpoint("qwen2_moe", tmp_path)
    held = load_model(folder, model_format="fp8", dequantise=False)
    leaves = named_leaves(held)
    assert str(leaves["layers.1.mlp.experts.down.weight.values"].dtype) == "float8_e4m3fn"
    assert leaves["layers.1.mlp.router.weight"].dtype == jnp.float32
    weight = held.merge(held.leaves).layers[1].mlp.experts.down.weight
    for expert in range(weight.shape[0]):
        np.testing.assert_array_equal(weight.dense_at(jnp.array(expert)), weight.dense()[expert])
