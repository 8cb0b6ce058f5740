"""Device time of small functions: kernel times alone, as the profiler reads them from the GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

from lmdeploy_jax.bench.gpu_trace import by_program, traced
from lmdeploy_jax.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """A function to time over several sets of arguments, so many that no set stays in the device's cache.

    state: arrays that it takes before the arguments, writes in place and returns before anything else.
    compiler_options: what XLA is told.
    """

    function: Callable[..., Any]
    arguments: Sequence[tuple[Any, ...]]
    state: list[Any] = field(default_factory=list)
    compiler_options: dict[str, Any] = field(default_factory=dict)


def device_seconds(cases: Sequence[Case], repeats: int = 2) -> list[float | None]:
    """Mean seconds that the kernels of each case take a call; None for a case that does not compile.

    Raises ConfigError where the default device is no GPU.
    """
    require_gpu()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(_compiled, range(len(cases)), cases))
    for program, case in zip(compiled, cases, strict=True):
        if program is not None:
            jax.block_until_ready(_call(program, case, case.arguments[0]))
    with traced() as events:
        for program, case in zip(compiled, cases, strict=True):
            if program is not None:
                _run(program, case, repeats)
    programs = by_program(events)
    return [
        sum(event["dur"] for event in programs[_name(i)]) / 1e6 / (repeats * len(case.arguments))
        if compiled[i] is not None
        else None
        for i, case in enumerate(cases)
    ]


def require_gpu() -> None:
    """Raises ConfigError where the default device is no GPU."""
    if jax.default_backend() != "gpu":
        raise ConfigError("kernel times are read on an NVIDIA GPU, and JAX sees none here")


def _run(program: Callable[..., Any], case: Case, repeats: int) -> None:
    last = None
    for _ in range(repeats):
        for arguments in case.arguments:
            last = _call(program, case, arguments)
    jax.block_until_ready(last)


def _call(program: Callable[..., Any], case: Case, arguments: tuple[Any, ...]) -> Any:
    out = program(*case.state, *arguments)
    if case.state:
        case.state[:] = out[: len(case.state)]
    return out


def _name(index: int) -> str:
    return f"timed_case_{index}"


def _compiled(index: int, case: Case) -> Callable[..., Any] | None:
    def function(*arguments: Any) -> Any:
        return case.function(*arguments)

    function.__name__ = _name(index)
    try:
        jitted = jax.jit(function, donate_argnums=range(len(case.state)))
        return jitted.lower(*case.state, *case.arguments[0]).compile(case.compiler_options)
    except jax.errors.JaxRuntimeError:  # more shared memory or registers than there are
        return None
