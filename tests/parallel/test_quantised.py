"""Quantised weights on several devices, which have their shares of words and scales: the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import virtual_devices

ROOT = Path(__file__).parents[2]


def found(what: str) -> list[dict]:
    env = virtual_devices(4)
    command = [sys.executable, "-m", "tests.parallel.quantised_program", what]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("kind", "most"), [("awq", 1e-5), pytest.param("ct_int8", 0.05, marks=pytest.mark.full)]
)
def test_logits_on_several_devices(kind: str, most: float) -> None:
    """Groups of 16 columns, of which a device of four has 24; KV heads that are repeated. INT8 activations
    are rounded a device, so that they differ a little from those of one.
    """
    lines = found(kind)
    assert [line["tp"] for line in lines] == ([1, 2, 4] if kind == "awq" else [1, 2])
    for line in lines:
        assert line["error"] < most
        assert line["held"] == 8
        assert line["converted"]


@pytest.mark.parametrize("backend", ["xla", pytest.param("pallas_interpret", marks=pytest.mark.full)])
def test_quantised_experts_are_dealt_out(backend: str) -> None:
    lines = found(backend)
    assert [line["tp"] for line in lines] == ([2] if backend == "xla" else [2, 4])
    assert max(line["error"] for line in lines) < 1e-5
