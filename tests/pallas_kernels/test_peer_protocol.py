"""Steps' sums and gathers over devices that store into each other's memory, on `peer_machine`'s devices."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.all_gather import pallas as gathering
from lmdeploy_jax.pallas_kernels.all_reduce_norm import pallas as summing
from lmdeploy_jax.pallas_kernels.workspace import EMPTY, HEADER_BYTES, Workspace
from tests.pallas_kernels.peer_machine import Kernel, Machine, Ref

ROWS, SIZE = 3, 16
PARTS = {0.0: 0.3, -1e-9: 0.3, 1.0: 0.2, -2.0: 0.19, np.inf: 0.005, np.nan: 0.005}  # and how often they come
"""The second is -0.0 in 16 bits, of which the word is made that means an empty place."""


def a_sum(machine, rows, numbers):
    """Every device's kernel of a sum of parts, what becomes of its residual stream, and what should."""
    shape = (machine.devices, int(numbers.integers(1, 3)), rows, SIZE)
    parts = numbers.choice(list(PARTS), shape, p=list(PARTS.values())).astype(np.float32)
    x, ones = numbers.integers(-9, 9, (rows, SIZE)).astype(np.float16), np.ones(SIZE, np.float16)
    with np.errstate(invalid="ignore"):
        want = (x + sum(parts.sum(1).astype(np.float16).astype(np.float32))).astype(np.float16)
    found, how = [np.zeros_like(x) for _ in parts], {"workspace": machine.layout, "eps": 1e-5, "offset": 0.0}
    kernels = []
    for mine, table, out in zip(parts, machine.tables, found, strict=True):
        refs = [Ref(x), Ref(mine), Ref(ones), table, Ref(out), Ref(np.zeros_like(x))]
        kernels.append(Kernel(summing._kernel, rows, refs, how))
    return kernels, found, [want] * machine.devices


def a_gather(machine, rows, numbers):
    """The same of a gather: a token and a score a row."""
    tokens = numbers.integers(0, 1 << 17, (machine.devices, rows, 1), dtype=np.int32)
    scores = numbers.normal(size=tokens.shape).astype(np.float32).view(np.int32)
    want, kernels = np.concatenate([tokens, scores], axis=2), []
    found = [np.zeros_like(want) for _ in want]
    for mine, table, out in zip(want, machine.tables, found, strict=True):
        refs = [Ref(mine), table, Ref(out)]
        kernels.append(Kernel(gathering._kernel, rows, refs, {"workspace": machine.layout}))
    return kernels, found, [want] * machine.devices


def steps(machine, count, numbers):
    """Decode steps of other row counts each, some of whose heads take fewer rows, and prompts between them,
    of which only the head's few rows are exchanged here.
    """
    for _ in range(count):
        rows = int(numbers.integers(1, ROWS + 1))
        for _ in range(int(numbers.integers(0, 4))):
            yield a_sum(machine, rows, numbers)
        yield a_gather(machine, int(numbers.integers(1, rows + 1)), numbers)


def check(monkeypatch, devices, seed, count):
    machine = Machine(devices, Workspace(devices, SIZE * 2, ROWS), seed)
    machine.use(monkeypatch)
    launched = list(steps(machine, count, np.random.default_rng(seed)))
    machine.run([[kernels[rank] for kernels, _, _ in launched] for rank in range(devices)])
    for _, found, want in launched:
        np.testing.assert_array_equal(found, want)
    header = HEADER_BYTES // 4
    assert all(memory[:header] == machine.memory[0][:header] for memory in machine.memory)
    assert all(set(memory[header:]) == {EMPTY} for memory in machine.memory)


def test_no_share_is_read_early_overwritten_or_left(monkeypatch):
    check(monkeypatch, 2, 1, 5)
    check(monkeypatch, 3, 2, 2)


@pytest.mark.full
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_nor_in_many_steps_of_more_devices(monkeypatch, devices, seed):
    check(monkeypatch, devices, seed, 100 // devices)
