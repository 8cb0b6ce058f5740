"""Steps around the kernels, compiled for an H200 where JAX's CUDA plugin is installed; no GPU is needed."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.h200 import PROGRAMS, reports_of

KERNELS = {"decode": {"paged_attention"}, "prefill": {"rope_kv_write", "prefill_attention"}}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    return reports_of("tests.pallas_kernels.h200")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_step_is_one_command_buffer_without_copies(reports: dict[str, dict], name: str) -> None:
    report = reports[name]
    assert report["caches_aliased"]
    assert report["cache_copies"] == 0
    assert report["outside_command_buffer"] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_do_not_spill(reports: dict[str, dict], name: str) -> None:
    kernels = reports[name]["kernels"]
    if not kernels:
        pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc")
    assert KERNELS[name.split()[0]] <= kernels.keys()
    assert {kernel: facts["spilled"] for kernel, facts in kernels.items() if facts["spilled"]} == {}
