"""Whole engines on virtual CPU devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.process.replicas import Replicas
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.devices import virtual_devices
from tests.engine.harness import config, tokens


@pytest.mark.full
def test_1000_random_requests_and_aborts_on_two_devices_leave_nothing_behind():
    command = [sys.executable, "-m", "tests.parallel.soak_program", "1000"]
    root = Path(__file__).parents[2]
    env = virtual_devices(2)
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_two_copies_on_two_devices_each_answer_as_one_engine_does(tmp_path, monkeypatch):
    tokenizer = Tokenizer(TINY_CHAT)
    prompts = [tokenizer.encode(text) for text in ("What is 12 + 30?", "Spell the word cat.")]
    one = Engine(TINY_CHAT, config(tmp_path), progress=False)
    wanted = tokens(one, prompts, max_new_tokens=12)
    one.close()
    for name, value in virtual_devices(2).items():  # the copies' processes see it, this one no longer
        monkeypatch.setenv(name, value)
    four = Replicas(TINY_CHAT, config(tmp_path, dp=2, tp=2), progress=False)
    assert [tokens(four, [prompt] * 2, max_new_tokens=12) for prompt in prompts] == [
        [each] * 2 for each in wanted
    ]
    four.close()
