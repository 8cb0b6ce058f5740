"""The work is fixed: the figures of different engines compare only if every id and length is the same."""

from __future__ import annotations

import hashlib
import json

import pytest

from lmdeploy_jax.bench.workloads import HIGHEST_ID, LOWEST_ID, MAX_LEN, WORKLOADS, make

# requests, prompt tokens, output tokens, SHA-256 over every prompt and output length
PINNED = {
    "b1": (1, 128, 256, "8b99a0a121f0640dbd539797e464ccdaeacbea46c146e13cfc28502540662a77"),
    "b32": (32, 16384, 8192, "07a097387af246f4c573893b0a5999fcfc9ec651a4651de4c68186376e3d742f"),
    "b128": (128, 65536, 32768, "0ca7f880a1fe2baccadf930e2f69b88caa8da6adcd64ea079b287908d4a99b2a"),
    "mix256": (256, 78448, 55786, "a927808592a3c6b6e1e7a9203a8436c3724f3d227f37840f60e2107fac7628a3"),
    "long64": (64, 495616, 16384, "1c4cdb85b00990ca2ec9c22d7e2d570a9480b783aaaf5b64565686f170624a05"),
    "smoke": (4, 128, 32, "23aca906b8208936efe0efe00d04d6a55c2296e629273ca79e9c965d7b663377"),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_work_is_pinned(name: str) -> None:
    jobs = make(name)
    digest = hashlib.sha256()
    for job in jobs:
        digest.update(json.dumps([job.prompt, job.output]).encode())
    sizes = (len(jobs), sum(len(job.prompt) for job in jobs), sum(job.output for job in jobs))
    assert (*sizes, digest.hexdigest()) == PINNED[name]
    longest = max(len(job.prompt) + job.output for job in jobs)
    assert longest == 8000 if name == "long64" else longest <= MAX_LEN
    assert all(LOWEST_ID <= token < HIGHEST_ID for job in jobs for token in job.prompt)


@pytest.mark.parametrize("vocabulary", [2, 300, 301, 2560, 29999])
def test_ids_are_folded_into_a_small_vocabulary(vocabulary: int) -> None:
    tokens = {token for job in make("smoke", ids_below=vocabulary) for token in job.prompt}
    assert max(tokens) < vocabulary
    assert len(tokens) > min(vocabulary, 100) // 3
    if vocabulary > 2 * LOWEST_ID:
        assert min(tokens) >= LOWEST_ID


def test_a_large_vocabulary_changes_nothing() -> None:
    assert make("smoke", ids_below=151936) == make("smoke")


def test_seeds_differ() -> None:
    assert make("smoke", seed=1) != make("smoke")
