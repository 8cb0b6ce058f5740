"""A decode step on two H200s, compiled where JAX's CUDA plugin is installed; no GPU is needed."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.h200 import reports_of
from tests.parallel.h200 import LAYERS, TP


@pytest.fixture(scope="module")
def reports():
    return reports_of("tests.parallel.h200")


@pytest.fixture(scope="module")
def graphs():
    return reports_of("tests.parallel.graphs_on_h200")


@pytest.mark.parametrize("name", ["untuned", "tuned"])
def test_devices_sum_twice_a_layer_and_once_for_the_embedding(reports, name):
    assert reports[name]["collectives"] == {"all-reduce": 1 + 2 * LAYERS}


def test_sums_of_few_rows_are_the_next_norm_s(reports):
    """That of the embedding too."""
    assert reports["peers"]["collectives"] == {}
    assert reports["peers"]["kernels"]["all_reduce_add_rms_norm"] == 2 * LAYERS + 1


def test_a_share_is_stored_and_read_and_its_place_emptied_once(reports):
    """JAX tells Triton that assembly is pure, so that it might be left out or done again."""
    moves = reports["peers"]["moves"]
    assert set(map(tuple, moves.values())) == {(TP + TP, TP)}


@pytest.mark.full
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("size", [1, 64])
def test_a_step_over_devices_is_one_cuda_graph(graphs, tp, size):
    assert graphs[f"tp {tp} decode_greedy {size}"]["outside_command_buffer"] == []
    assert graphs[f"tp {tp} decode_greedy {size}"]["cache_copies"] == 0


def test_a_device_s_share_can_be_done_by_the_kernels_for_few_rows(reports):
    """All but the first layer's qkv product, which has no norm to begin with."""
    tuned, untuned = (reports[name]["kernels"] for name in ("tuned", "untuned"))
    assert tuned["norm_skinny_gemm"] == 2 * LAYERS - 1
    assert tuned["skinny_gemm"] == 2 * LAYERS + 1
    assert sum(tuned.values()) < sum(untuned.values())
