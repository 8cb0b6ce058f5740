"""Models that judge texts, on two devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import virtual_devices


@pytest.mark.full
def test_scores_on_two_devices_equal_transformers():
    env = virtual_devices(2)
    command = [sys.executable, "-m", "tests.parallel.scores_program"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"reward", "classifier"}
    assert max(found.values()) < 1e-4, found
