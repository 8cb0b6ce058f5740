"""Tensor parallelism on virtual CPU devices: the same logits, no weight or cache sent between devices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.devices import virtual_devices

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[int, dict]:
    """Findings for tied embeddings, biases, an odd vocabulary, and fewer KV heads than devices."""
    env = virtual_devices(4)
    command = [sys.executable, "-m", "tests.parallel.tp_program", "qwen2"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["tp"]: line for line in lines}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_equal_transformers(found, tp):
    assert found[tp]["error"] < 1e-4


def test_kv_heads_are_repeated_where_devices_are_more(found):
    assert [found[tp]["kv_heads"] for tp in (1, 2, 4)] == [2, 2, 4]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_converted_checkpoint_loads_alike(found, tp):
    assert found[tp]["converted_alike"]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_of_a_converted_checkpoint_each_device_reads_its_own_part(found, tp):
    """What all devices have whole is read once, KV heads that several have as often."""
    assert 1 <= found[tp]["read"] <= found[tp]["held"] <= (1 if tp == 1 else 1.2)
    assert found[tp]["largest_read"] <= 1.02 / tp  # a row more of what is padded


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_head_that_differs_from_a_tied_embedding_is_kept(found, tp):
    assert found[tp]["head_kept"]


def test_only_activations_are_communicated(found):
    """One sum for the embedding and two a layer, [rows, E]; then the logits."""
    assert Counter(found[4]["collectives"]) == {"all-reduce f32[3,64]": 5, "all-gather f32[3,260]": 1}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_device_s_share_of_each_product_can_be_tuned(found, tp):
    assert found[tp]["tunable"]


def test_hand_written_products_serve_each_device(found):
    """In bfloat16; an error of zero would mean that they were left out, since they round differently."""
    as_they_are, summed, by_peers = found[2]["tuned_errors"]
    assert 0 < as_they_are < 2e-2
    assert 0 < summed < 2e-2
    assert 0 < by_peers < 2e-2
