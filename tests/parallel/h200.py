"""A decode step on two H200s, compiled without one: `python -m tests.parallel.h200`.

Prints a JSON line a program; see `tests.pallas_kernels.h200` for what it needs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmdeploy_jax.bench import shapes, tune
from lmdeploy_jax.cache.kv import CacheSpec, KVCache
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.converters.load import build_skeleton
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.models.tuning import UNTUNED, Measurement, Tuning
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling
from lmdeploy_jax.parallel.mesh import AXES
from lmdeploy_jax.parallel.peers import table_spec
from tests.pallas_kernels.h200 import TARGET
from tests.pallas_kernels.programs import as_on_h200

LAYERS, TP, PAGES = 2, 2, 65
RAW = shapes.read("llama3-8b") | {"num_hidden_layers": LAYERS, "vocab_size": 4096}
CONFIG = build_config(RAW, "llama3-8b")


def tuned() -> Tuning:
    """As if every product of one row were fastest by hand, on one device's share of the weight."""

    def fastest(shape: tune.Shape) -> Measurement:
        tiling = Tiling(64, 128, 4 if shape.kind == "parts" else 1, 4, 4)
        return Measurement(tune.FORMAT, shape.kind, shape.out, shape.inner, 1, tiling, 1.0, 2.0)

    return Tuning(tuple(map(fastest, tune.products(CONFIG, TP).values())))


PEERS = Tuning(all_reduce="pallas")


def report(name: str, table: Tuning, mesh: Mesh) -> dict[str, object]:
    """Compiles a decode step of one sequence, without its head, and returns its facts."""
    dtype = jnp.dtype("bfloat16")
    skeleton = build_skeleton(CONFIG, dtype, Kernels("pallas", mesh, table))
    layout = CONFIG.cache_layout(TP, session_len=2048, step_tokens=1)
    cache = CacheSpec(layout, PAGES, dtype, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    one, pages = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere) for shape in ((1,), (1, 32)))
    batch = Batch(one, one, one, (AttentionMetadata(one, pages, one),), one)

    peers = table_spec(mesh) if skeleton.kernels.has_peers else None

    def step(
        leaves: tuple[jax.Array, ...], cache: KVCache, batch: Batch, peers: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        return skeleton.merge(leaves, peers)(cache, batch)

    jitted = jax.jit(step, donate_argnums=1, out_shardings=(everywhere, cache.shardings))
    lowered = jitted.lower(tuple(skeleton.specs.values()), cache.specs, batch, peers)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}
        compiled = lowered.compile(compiler_options=options)
        (thunks,) = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        moved = moves("".join(path.read_text() for path in Path(folder).glob("*.ptx")))
        launched = re.findall(
            r"^\s*\d+: kCustomKernel .*\] (\w+?)(?:__\d+)? grid", thunks.read_text(), re.MULTILINE
        )
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    collectives = re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())
    found = {"collectives": Counter(collectives), "kernels": Counter(launched)}
    return {"program": name, **found, "moves": moved}


def moves(ptx: str) -> dict[str, list[int]]:
    """A thread's stores to devices' memory and its loads from what they store, by kernel."""
    entries = (part for part in ptx.split(".entry ")[1:] if ".volatile" in part)
    kinds = [f"{kind}.volatile.global.v4" for kind in ("st", "ld")]
    return {entry.split("(")[0].strip(): [entry.count(kind) for kind in kinds] for entry in entries}


def main() -> None:
    jax.devices()  # loads the plugins
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{TP}"
    )
    mesh = topologies.make_mesh(topology, (1, TP, 1), AXES)
    with as_on_h200():
        for name, table in {"untuned": UNTUNED, "tuned": tuned(), "peers": PEERS}.items():
            print(json.dumps(report(name, table, mesh)), flush=True)


if __name__ == "__main__":
    main()
