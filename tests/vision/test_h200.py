"""A tower's runs, compiled for an H200 where JAX's CUDA plugin is installed; no GPU is needed."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.h200 import reports_of
from tests.vision.h200 import FUSED_TILES, LAYERS, TILES

OF_A_LAYER, OF_A_FUSED_LAYER, BESIDE_LAYERS = 8, 5, 14


@pytest.fixture(scope="module")
def reports():
    return reports_of("tests.vision.h200")


@pytest.mark.parametrize("tiles", TILES)
def test_a_run_is_one_cuda_graph_of_few_kernels(reports, tiles):
    report = reports[f"{tiles} tiles"]
    assert report["outside_command_buffer"] == []
    assert len(report["launches"]) <= OF_A_LAYER * LAYERS + BESIDE_LAYERS


@pytest.mark.parametrize("tiles", FUSED_TILES)
def test_a_fused_layer_is_four_products_and_attention(reports, tiles):
    """No norm and no sum is a kernel of its own."""
    report = reports[f"{tiles} tiles, fused"]
    assert report["outside_command_buffer"] == []
    assert len(report["launches"]) <= OF_A_FUSED_LAYER * LAYERS + BESIDE_LAYERS
