"""What starting costs, program by program: tracing, compiling, and one run, with weights of zeros.

    python -m benchmarks.start llama3-8b --tp 2
    python -m benchmarks.start llama3-8b --tp 2 --option xla_gpu_enable_triton_gemm=false
    python -m benchmarks.start llama3-8b --tp 2 --all

No checkpoint is needed. Some programs are compiled one after the other; `--all` compiles all of them as a
start does and tells when each began and ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.cache.kv import CacheSpec
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.converters.load import LoadedModel, build_skeleton
from lmdeploy_jax.engine.core import buckets, compile
from lmdeploy_jax.engine.core.batch import Slots
from lmdeploy_jax.engine.core.page_tables import PageTables
from lmdeploy_jax.engine.core.program import Program, Programs
from lmdeploy_jax.engine.core.program_cache import ProgramCache
from lmdeploy_jax.engine.core.setup import choose_backend, steps_for
from lmdeploy_jax.engine.core.state import DeviceState
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.pallas_kernels.prefill_attention import tile_rows
from lmdeploy_jax.parallel.mesh import make_mesh

BATCH, TOKENS, SESSION, PAGES = 256, 8192, 8192, 513
WANTED = "decode_greedy:256,decode_greedy:32,ragged:1024,ragged:8192,decode_greedy:1,sample:256,full:256"
RUNS = 20


def programs_of(shape: str, tp: int, options: dict[str, object], *, tuned: bool) -> Programs:
    """All of an engine's, as for a GPU with room for its defaults."""
    mesh, dtype = make_mesh(tp=tp), jnp.dtype("bfloat16")
    device = mesh.devices.flat[0]
    config = build_config(shapes.read(shape), shape)
    backend = choose_backend("auto", device, config)
    kernels = Kernels(backend, mesh, tuning.load(device.device_kind) if tuned else tuning.UNTUNED)
    skeleton = build_skeleton(config, dtype, kernels)
    leaves = tuple(zeros(spec.shape, spec.dtype, spec.sharding)() for spec in skeleton.specs.values())
    sizes = buckets.plan("gpu", BATCH, TOKENS)
    layout = config.cache_layout(tp, session_len=SESSION, step_tokens=TOKENS)
    pages = CacheSpec(layout, PAGES, dtype, mesh, 2 * BATCH + 1)
    state = DeviceState(LoadedModel(skeleton, leaves, dtype), pages, BATCH)
    programs = Programs(state, lambda program: program.lower().compile(options), options)
    slots = Slots(PageTables(SESSION, layout.groups, sizes), config.vocab_size)
    steps_for(device.platform)(programs, slots, sizes, tile_rows(backend))
    return programs


@cache
def zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    """Layers alike share what makes their weights."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def alone(programs: Programs, wanted: str) -> Iterator[str]:
    """A line for each program that is wanted, of those that the device has."""
    programs.state.allocate_caches()
    yield f"{'program':>20} {'trace s':>8} {'compile s':>9} {'first run s':>11} {'ms a run':>9}"
    for name, size in (each.split(":") for each in wanted.split(",")):
        if (key := (name, int(size))) not in programs:
            continue
        program, begun = programs[key], time.perf_counter()
        lowered = program.lower()
        traced = time.perf_counter()
        program.compiled = lowered.compile(programs.compiler_options or None)
        compiled = time.perf_counter()
        told = f"{key[0]:>14} {key[1]:>5} {traced - begun:8.2f} {compiled - traced:9.2f}"
        yield told + (" {:11.2f} {:9.3f}".format(*run_times(program)) if key[0] in RUNNABLE else "")


RUNNABLE = ("decode_greedy", "ragged")


def run_times(program: Program) -> tuple[float, float]:
    """Seconds of the first run, milliseconds of each that follows."""
    packed = program.pack([])

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            result = program(packed=packed)
        jax.block_until_ready(result)
        return time.perf_counter() - begun

    return run(1), (run(3), run(RUNS))[1] / RUNS * 1e3


def everything(programs: Programs) -> Iterator[str]:
    """When the compilation of each program began and ended, in seconds from the start on."""
    begun, original = time.perf_counter(), compile._compile_and_store
    lines: list[tuple[float, float, str]] = []

    def timed(lowered: jax.stages.Lowered, program: Program, kept: ProgramCache) -> jax.stages.Compiled:
        first = time.perf_counter() - begun
        try:
            return original(lowered, program, kept)
        finally:
            lines.append((first, time.perf_counter() - begun, f"{program.key[0]}-{program.key[1]}"))
            print(f"{lines[-1][0]:7.1f} {lines[-1][1]:7.1f}  {lines[-1][2]}", flush=True)

    compile._compile_and_store = timed
    nothing_kept = ProgramCache(None, list(programs.state.replicated.mesh.devices.flat))
    compile.compile_all(programs, nothing_kept, progress=False)
    yield f"{len(lines)} programs in {time.perf_counter() - begun:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--programs", default=WANTED, help="NAME:SIZE, and so on")
    parser.add_argument("--untuned", action="store_true", help="as if no product had been measured")
    parser.add_argument("--option", action="append", default=[], help="of XLA's compiler: NAME=JSON")
    given = parser.parse_args()
    options = {name: json.loads(value) for name, _, value in (each.partition("=") for each in given.option)}
    programs = programs_of(given.shape, given.tp, options, tuned=not given.untuned)
    for line in everything(programs) if given.all else alone(programs, given.programs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
