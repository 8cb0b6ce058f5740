"""Families whose layers are not those of a Llama: on two devices, and through the kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import virtual_devices

ROOT = Path(__file__).parents[2]
MORE = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "phimoe", "ernie4_5_moe", "hunyuan_moe", "olmoe"),
    *("glm4", "olmo3", "cohere2", "exaone4", "ministral3", "starcoder2", "apertus", "arcee"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "qwen3_next", "qwen3_5", "qwen3_5_moe"),
    *("nemotron_h", "granite_hybrid", "falcon_h1", "falcon_h1_norm", "lfm2", "lfm2_moe"),
    *("cohere_qk_norm", "cohere2_moe", "exaone_moe", "minicpm3"),
)

KERNELS = ("gpt_oss", "minimax_m2", "gemma4", "gemma4_moe", "llama4")


NAMES = ("minimax_m2", "granite_hybrid")


def errors(devices: str, *names: str) -> dict[str, dict[str, float]]:
    env = virtual_devices(4)
    command = [sys.executable, "-m", "tests.parallel.families_program", devices, *names]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: found for line in lines for name, found in line.items()}


def test_two_devices_and_the_kernels_equal_transformers():
    _assert_close(errors("2", *NAMES, "--interpreted", "gpt_oss"), 3)


@pytest.mark.full
@pytest.mark.parametrize(
    "names", [KERNELS, *(MORE[i : i + 8] for i in range(0, len(MORE), 8))], ids=lambda x: x[0]
)
def test_every_family(names):
    """In parts, since all of them take more than a quarter of an hour."""
    _assert_close(errors("2,4", "--interpreted", *names), len(names))


def _assert_close(found, count):
    assert len(found) == count
    assert {name: each for name, each in found.items() if max(each.values()) >= 1e-4} == {}
