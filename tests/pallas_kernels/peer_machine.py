"""Made-up GPUs that store into each other's memory, as an adversary would have them.

They run the kernels as these stand, their assembly statement by statement. A word of 4 bytes that is stored
arrives when chance wants it, in any order but that of one program's stores to one address; words of a load
are read one at a time. What is relied on: who ends a kernel has stored all that it stores, and a program's
threads wait for each other where they add up what all of them have (a program is one thread here).
"""

from __future__ import annotations

import inspect
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from lmdeploy_jax.pallas_kernels import peer_memory
from lmdeploy_jax.pallas_kernels.workspace import EMPTY, HEADER_BYTES, Workspace

BASE = (1 << 40) + (1 << 31)  # of the first device's workspace: the low half of its address is negative
APART = 1 << 33  # bytes between two devices' workspaces


class Ref:
    """What a kernel sees of an array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return jnp.asarray(self.array[index])

    @property
    def at(self) -> _At:
        return _At(self.array)


@dataclass
class _At:
    array: np.ndarray

    def __getitem__(self, index: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        each = index if isinstance(index, tuple) else (index,)
        return self.array, tuple(np.broadcast_arrays(*map(np.asarray, each)))


def _load(place: Any, *, mask: jax.Array, other: Any = 0) -> jax.Array:
    array, index = place
    inside = array[tuple(np.where(mask, each, 0) for each in index)]
    return jnp.asarray(np.where(mask, inside, np.asarray(other, array.dtype)))


def _store(place: Any, value: jax.Array, *, mask: jax.Array) -> None:
    array, index = place
    array[tuple(each[np.asarray(mask)] for each in index)] = np.asarray(value)[np.asarray(mask)]


@dataclass
class Kernel:
    """A launch of `rows` programs of `function` over `refs` on one device."""

    function: Callable[..., None]
    rows: int
    refs: Sequence[Ref]
    how: Mapping[str, Any]


class _Program(threading.Thread):
    """A row's, which stops before it loads from memory that others write."""

    def __init__(self, machine: Machine, device: int, kernel: Kernel, row: int) -> None:
        super().__init__(daemon=True)
        self.machine, self.device, self.kernel, self.row = machine, device, kernel, row
        self.go, self.seen, self.waits_for = threading.Semaphore(0), -1, -1  # how many words have arrived
        self.ended, self.error = False, None
        self.start()

    def run(self) -> None:
        self.go.acquire()
        try:
            inspect.unwrap(self.kernel.function)(*self.kernel.refs, **self.kernel.how)
        except BaseException as error:
            self.error = error
        self.ended = True
        self.machine.back.release()

    def pause(self) -> None:
        self.machine.back.release()
        self.go.acquire()


Store = tuple[_Program, int, int]  # whose, and the device and the word that it goes to


class Machine:
    """Devices that each run a list of kernels, one after the other."""

    def __init__(self, devices: int, layout: Workspace, seed: int) -> None:
        self.random, self.devices, self.layout = random.Random(seed), devices, layout
        empty = [0] * (HEADER_BYTES // 4) + [EMPTY] * ((layout.nbytes - HEADER_BYTES) // 4)
        self.memory = [list(empty) for _ in range(devices)]
        self.under_way: dict[Store, list[int]] = {}
        self.arrived = [0] * devices
        self.back, self.now = threading.Semaphore(0), None
        halves = np.array([BASE + rank * APART for rank in range(devices)], np.int64).view(np.int32)
        rows = [[rank, *halves[2 * rank :][:2], *halves] for rank in range(devices)]
        self.tables = [Ref(np.array([row], np.int32)) for row in rows]

    def use(self, monkeypatch: Any) -> None:
        """Kernels' primitives are this machine's from now on."""
        monkeypatch.setattr(plt, "load", _load)
        monkeypatch.setattr(plt, "store", _store)
        monkeypatch.setattr(pl, "program_id", lambda axis: jnp.int32(self.now.row))
        monkeypatch.setattr(peer_memory, "_packed", self._packed)

    def run(self, kernels: Sequence[Sequence[Kernel]]) -> None:
        """Every device's, to their end. Raises AssertionError where all wait for each other."""
        left, pace = [list(each) for each in kernels], [1.0] * self.devices
        active: list[list[_Program]] = [[] for _ in kernels]
        while True:
            for device in range(self.devices):
                active[device] = self._active(device, active[device], left[device])
            if not any(active):
                return
            if self.random.random() < 0.02:  # some devices fall behind, others run ahead
                pace = [self.random.choice((0.01, 1.0)) for _ in pace]
            able = [p for programs in active for p in programs if p.waits_for != self.arrived[p.device]]
            assert able or self.under_way, "all wait for what nobody has stored"
            if not able or (self.under_way and self.random.random() < 0.3):
                self._arrive(self.random.choice(list(self.under_way)))
            else:
                self._step(self.random.choices(able, [pace[p.device] for p in able])[0])

    def _active(self, device: int, programs: list[_Program], left: list[Kernel]) -> list[_Program]:
        """Those that have not ended; if all have, the next kernel's."""
        programs = [program for program in programs if not program.ended]
        if programs:
            return programs
        stores = [store for store in self.under_way if store[0].device == device]
        for store in self.random.sample(stores, len(stores)):
            while store in self.under_way:
                self._arrive(store)
        launched = [left.pop(0)] if left else []
        return [_Program(self, device, kernel, row) for kernel in launched for row in range(kernel.rows)]

    def _step(self, program: _Program) -> None:
        self.now = program
        program.go.release()
        self.back.acquire()
        if program.error is not None:
            raise program.error

    def _arrive(self, store: Store) -> None:
        _, device, word = store
        self.memory[device][word] = self.under_way[store].pop(0)
        self.arrived[device] += 1
        if not self.under_way[store]:
            del self.under_way[store]

    # -- what the assembly does ----------------------------------------------------------------------------

    def store(self, address: int, value: int) -> None:
        self.under_way.setdefault((self.now, *_place(address)), []).append(value)

    def load(self, address: int) -> int:
        """A program sees its own stores."""
        if self.random.random() < 0.5:
            self.now.pause()
        store = (self.now, *_place(address))
        while store in self.under_way:
            self._arrive(store)
        return self.memory[store[1]][store[2]]

    def again(self) -> None:
        """Nothing else is to be seen before something arrives that the last load has not seen."""
        self.now.waits_for = self.now.seen
        self.now.pause()
        self.now.waits_for = -1

    def _packed(self, code: str, results: int, pack: int, dtype: Any, *arguments: jax.Array) -> jax.Array:
        """In place of `peer_memory._packed`: the threads of a program, in any order."""
        rows = [np.ascontiguousarray(np.asarray(each).reshape(-1, pack)).view(np.int32) for each in arguments]
        operands, found = np.concatenate(rows, axis=1).tolist(), {}
        for thread in self.random.sample(range(len(operands)), len(operands)):
            registers = {f"${results + i}": word for i, word in enumerate(operands[thread])}
            self._execute(code, registers | {"%tid.x": thread}, found.setdefault(thread, {}))
        words = [[found[thread][f"${i}"] for i in range(results)] for thread in range(len(operands))]
        return jnp.asarray(np.array(words, np.int32).reshape(-1).view(np.dtype(dtype)))

    def _execute(self, code: str, given: dict[str, int], registers: dict[str, int]) -> None:
        registers |= given
        statements, labels = _parse(code)
        at = 0
        while at < len(statements):
            guard, operation, operands = statements[at]
            at += 1
            if guard and bool(registers[guard.lstrip("!")]) == guard.startswith("!"):
                continue
            if operation == "bra":
                if labels[operands[0]] < at:
                    self.again()
                at = labels[operands[0]]
            else:
                self._do(operation, operands, registers)

    def _do(self, operation: str, operands: list[str], registers: dict[str, int]) -> None:
        def value(name: str) -> int:
            return registers[name] if name in registers else int(name)

        kind, target, *sources = operation.split(".")[0], *operands
        if kind == "ld":
            self.now.seen, address = self.arrived[self.now.device], value(sources[0].strip("[]"))
            for i, name in enumerate(_names(target)):
                registers[name] = self.load(address + 4 * i)
        elif kind == "st":
            for i, name in enumerate(_names(sources[0])):
                self.store(value(target.strip("[]")) + 4 * i, value(name))
        elif operation == "mov.b64":
            low, high = map(value, _names(sources[0]))
            registers[target] = (high << 32) | (low & 0xFFFFFFFF)
        else:
            registers[target] = VALUES[kind](operation, *map(value, sources))


def _place(address: int) -> tuple[int, int]:
    device, offset = divmod(address - BASE, APART)
    assert offset % 4 == 0
    return device, offset // 4


# -- PTX, as much as `peer_memory` has -----------------------------------------------------------------------


@cache
def _parse(code: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """Statements (guard, operation, operands), and the numbers of those that labels stand before."""
    form = re.compile(r"\s*(?:(\w+):)?\s*(?:@(!?\w+))?\s*(\S*)\s*(.*?)\s*", re.DOTALL)
    statements, labels = [], {}
    for text in code.strip()[1:-1].split(";"):
        label, guard, operation, operands = form.fullmatch(text).groups()
        if label:
            labels[label] = len(statements)
        if operation and not operation.startswith("."):
            statements.append((guard, operation, re.findall(r"\{.*?\}|\[.*?\]|[^\s,]+", operands)))
    return statements, labels


def _names(vector: str) -> list[str]:
    return re.findall(r"[$\w]+", vector)


def _compare(operation: str, a: int, b: int, other: int = 0) -> int:
    return int({"eq": a == b, "ge": a >= b, "lt": a < b}[operation.split(".")[1]] or bool(other))


def _add(operation: str, a: int, b: int) -> int:
    half = 1 << (int(operation[-2:]) - 1)
    return (a + b + half) % (2 * half) - half


VALUES: dict[str, Callable[..., int]] = {
    "mov": lambda _, a: a,
    "cvt": lambda _, a: a,
    "add": _add,
    "setp": _compare,
    "selp": lambda _, a, b, chosen: a if chosen else b,
}
