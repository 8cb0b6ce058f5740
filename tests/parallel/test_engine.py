"""A whole engine on two virtual devices answers as on one, whether experts are cut by width or dealt out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import virtual_devices

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen3_moe", "mxfp4"])
def test_experts_cut_and_dealt_out_give_the_tokens_of_one_device(kind: str) -> None:
    env = virtual_devices(2)
    command = [sys.executable, "-m", "tests.parallel.engine_program", kind, "1,1", "2,1", "2,2"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("[["))
    alone, *others = found
    assert [len(answer) for answer in alone] == [12, 12]
    assert len(others) == 2
    assert all(other == alone for other in others)
