"""The engine's steps, compiled for an H200 where JAX's CUDA plugin is installed; no GPU is needed."""

from __future__ import annotations

import pytest

from tests.engine.h200 import LAYERS, MIXTURES, QUANTISED, RECURRENT, WANTED
from tests.pallas_kernels.h200 import reports_of

MOST_LAUNCHES = {"decode": 6 + 7 * LAYERS, "ragged": 8 + 9 * LAYERS}


@pytest.fixture(scope="module")
def reports():
    return reports_of("tests.engine.h200")


@pytest.mark.parametrize("name", [name for name, _ in WANTED if name != "steps_greedy"])
def test_a_step_is_one_cuda_graph(reports, name):
    assert reports[name]["outside_command_buffer"] == []


def test_several_steps_are_a_loop_around_a_graph(reports):
    assert reports["steps_greedy"]["outside_command_buffer"][:1] == ["kWhile"]
    assert reports["steps_greedy"]["caches_aliased"]
    assert reports["steps_greedy"]["cache_copies"] == 0


@pytest.mark.parametrize("name", ["decode", "ragged"])
def test_the_cache_is_written_in_place_by_few_kernels(reports, name):
    assert reports[name]["caches_aliased"]
    assert reports[name]["cache_copies"] == 0
    assert reports[name]["launches"] <= MOST_LAUNCHES[name]


QUANTISED_LAUNCHES_OF_A_LAYER = {
    "fp8": 6,  # four products, gate and up with their norm, attention, and a norm that rounds
    "smooth_quant": 7,
    "awq": 8,  # one is the activation of gate and up, which come in parts
}


@pytest.mark.parametrize("model_format", QUANTISED)
def test_a_step_with_quantised_weights_is_one_cuda_graph_of_few_kernels(reports, model_format):
    report = reports[f"{model_format} decode"]
    assert report["outside_command_buffer"] == []
    assert report["cache_copies"] == 0
    assert report["launches"] <= 8 + QUANTISED_LAUNCHES_OF_A_LAYER[model_format] * LAYERS


STREAMED_LAUNCHES_OF_A_LAYER = {
    "fp8": 9,  # four products, two norms that round, attention, and what rounds for o and for down
    "smooth_quant": 9,
    "awq": 8,
}


@pytest.mark.parametrize("model_format", QUANTISED)
def test_many_rows_of_quantised_weights_take_as_few_kernels(reports, model_format):
    """No scaling behind a product, and no conversion of zero points before one."""
    report = reports[f"{model_format} streams"]
    assert report["outside_command_buffer"] == []
    assert report["launches"] <= 8 + STREAMED_LAUNCHES_OF_A_LAYER[model_format] * LAYERS


LAUNCHES_OF_A_LAYER = {
    "qwen3-30b-a3b-half": 14,
    "deepseek-v2-lite": 27,
    "qwen3-next": 22,
    "nemotron-3-nano": 8,
}
PROGRAMS = [
    (f"{shape} {name} {size}", 12 + LAUNCHES_OF_A_LAYER[shape] * LAYERS)
    for shape, wanted in (MIXTURES | RECURRENT).items()
    for name, size in wanted
]


@pytest.mark.parametrize(("program", "most_launches"), PROGRAMS)
def test_a_step_of_other_layers_is_one_cuda_graph_of_few_kernels(reports, program, most_launches):
    """No loop over experts, no sort of XLA's: what tokens choose changes no launch. States stay in place."""
    report = reports[program]
    assert report["outside_command_buffer"] == []
    assert report["caches_aliased"]
    assert report["cache_copies"] == 0
    assert report["launches"] <= most_launches


def test_kernels_around_latents_and_routers_make_launches_fewer(reports):
    """14 of a layer instead of 18."""
    report = reports["fused decode"]
    assert report["outside_command_buffer"] == []
    assert report["cache_copies"] == 0
    assert report["launches"] <= 9 + 14 * LAYERS
