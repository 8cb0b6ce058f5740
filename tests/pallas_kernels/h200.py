"""Compiles programs for an H200 on a machine without one, and reports what the compiler made of them.

    python -m tests.pallas_kernels.h200

prints one JSON line a program. It needs JAX's CUDA plugin (`jax[cuda12]` or `jax[cuda13]`) but no GPU: the
device is described by tests/data/h200.textpb, which was read from a real one. It runs as a process of its
own, since the plugin must be told before JAX starts not to look for a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.pallas_kernels.kv_formats import E4M3, INT4, INT8
from tests.pallas_kernels.programs import Model, Program, as_on_h200, decode_step, prefill_step

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
TARGET = Path(__file__).parent.parent / "data" / "h200.textpb"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
LAYERS = 2  # enough kernels for XLA to make a command buffer

LLAMA = Model(head_dim=128, heads=32, kv_heads=8, dtype="bfloat16")
ODD = Model(head_dim=80, heads=14, kv_heads=2, dtype="float16", window=100, soft_cap=30.0, sinks=True)
GEMMA = Model(head_dim=256, heads=8, kv_heads=4, dtype="bfloat16", window=1024, lookahead=True)
INT8_LLAMA, INT4_LLAMA, E4M3_LLAMA = (replace(LLAMA, form=form) for form in (INT8, INT4, E4M3))
PROGRAMS = {
    "decode llama": (decode_step, LLAMA),
    "prefill llama": (prefill_step, LLAMA),
    "decode odd": (decode_step, ODD),
    "prefill odd": (prefill_step, ODD),
    "prefill both ways": (prefill_step, GEMMA),
    "decode int8": (decode_step, INT8_LLAMA),
    "prefill int8": (prefill_step, INT8_LLAMA),
    "decode int4": (decode_step, INT4_LLAMA),
    "prefill int4": (prefill_step, INT4_LLAMA),
    "decode fp8": (decode_step, E4M3_LLAMA),
    "prefill fp8": (prefill_step, E4M3_LLAMA),
}


def report(name: str, program: Program, sharding: NamedSharding) -> dict[str, object]:
    """Compiles the program and returns its facts."""
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), program.specs)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}
        lowered = jax.jit(program.function, donate_argnums=0).lower(*specs)
        compiled = lowered.compile(compiler_options=options)
        caches = sum(spec.size * spec.dtype.itemsize for spec in jax.tree.leaves(specs[0]))
        return {
            "program": name,
            "caches_aliased": compiled.memory_analysis().alias_size_in_bytes >= caches,
            "cache_copies": sum(
                cache_copies(compiled.as_text(), leaf.shape) for leaf in jax.tree.leaves(specs[0][0][0])
            ),
            "outside_command_buffer": outside_command_buffer(Path(folder)),
            "kernels": _ptxas(Path(folder)),
        }


def cache_copies(program: str, shape: tuple[int, ...]) -> int:
    dimensions = ",".join(map(str, shape))
    return len(re.findall(rf"\[{dimensions}\]\S* copy(?:-start)?\(", program))


def outside_command_buffer(folder: Path) -> list[str]:
    """Kinds of the top-level thunks that are not command buffers."""
    (path,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    kinds = re.findall(r"^\d+: (\w+)", path.read_text(), re.MULTILINE)
    return [kind for kind in kinds if kind != "kCommandBuffer"]


def _ptxas(folder: Path) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel, where an assembler can be found."""
    assembler = next((p for entry in sys.path for p in Path(entry).glob("nvidia/**/bin/ptxas")), None)
    facts = {}
    for ptx in folder.glob("*.ptx") if assembler else ():
        command = [assembler, "-v", "-arch=sm_90a", ptx, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for part in log.split("Compiling entry function ")[1:]:
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            facts[part.split("'")[1]] = {"registers": registers, "spilled": spilled}
    return facts


def reports_of(module: str) -> dict[str, dict]:
    """What a module of this kind prints, by program. Skips the calling test where the plugin is missing."""
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        pytest.skip("needs JAX's CUDA plugin: pip install 'jax[cuda13]'")
    command = [sys.executable, "-m", module]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["program"]: line for line in map(json.loads, done.stdout.splitlines())}


def main() -> None:
    jax.devices()  # loads the plugins
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    for name, (step, model) in PROGRAMS.items():
        with as_on_h200():
            print(json.dumps(report(name, step(model, LAYERS), sharding)), flush=True)


if __name__ == "__main__":
    main()
