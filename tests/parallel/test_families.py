"""Families whose layers are not those of a Llama: on two devices, and through the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2_moe", "gpt_oss", "minimax_m2")
MORE = (
    *FAMILIES,
    *("mixtral", "qwen3_moe", "glm4_moe", "phimoe", "ernie4_5_moe", "hunyuan_moe", "olmoe", "glm4", "olmo3"),
    *("cohere2", "exaone4", "ministral3", "starcoder2", "apertus", "arcee"),
)


def errors(devices: str, *names: str) -> dict[str, dict[str, float]]:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.parallel.families_program", devices, *names]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: found for line in lines for name, found in line.items()}


@pytest.mark.parametrize(
    ("devices", "names"), [("2", FAMILIES), pytest.param("2,4", MORE, marks=pytest.mark.full)]
)
def test_logits_equal_transformers(devices, names):
    found = errors(devices, *names)
    assert found.keys() == set(names)
    assert {name: each for name, each in found.items() if max(each.values()) >= 1e-4} == {}
