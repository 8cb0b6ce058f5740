"""Families whose layers are not those of a Llama: on two devices, and through the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = ("qwen2_moe",)
MORE = ("mixtral", "qwen3_moe")


def errors(*names: str) -> dict[str, dict[str, float]]:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.parallel.families_program", *names]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: found for line in lines for name, found in line.items()}


@pytest.mark.parametrize("names", [FAMILIES, pytest.param(MORE, marks=pytest.mark.full)])
def test_logits_equal_transformers(names):
    found = errors(*names)
    assert found.keys() == set(names)
    assert {name: each for name, each in found.items() if max(each.values()) >= 1e-4} == {}
