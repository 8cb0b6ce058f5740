"""Run by test_tensor_parallel.py with four virtual CPU devices: prints one JSON line of findings a case."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.bench import tune
from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.models import residual, sharded
from lmdeploy_jax.models.batch import AttentionMetadata, Batch
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling
from lmdeploy_jax.pallas_kernels.workspace import OWN
from lmdeploy_jax.parallel import collectives as collectives_module
from lmdeploy_jax.parallel.mesh import axis_size, make_mesh
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import hf_logits, save_checkpoint

PROMPT, TOTAL = 70, 72


def logits(model: LoadedModel, ids: list[int], mesh: jax.sharding.Mesh) -> tuple[np.ndarray, PagedRunner]:
    runner = PagedRunner(model, mesh=mesh)
    (prefill,) = runner.ragged([(0, 0, ids[:PROMPT], PROMPT)])
    decoded = [runner.decode({0: (ids[i], i)})[0] for i in range(PROMPT, TOTAL)]
    return np.concatenate([prefill, decoded]), runner


def lowered(runner: PagedRunner) -> jax.stages.Lowered:
    """A decode step."""
    ints = np.zeros(runner.rows, np.int32)
    batch = Batch(ints, ints, ints, (AttentionMetadata(ints, runner.table, ints),), ints)
    return runner.step.lower(runner.model.leaves, runner.caches, batch, runner.peers)


def collectives(runner: PagedRunner) -> list[str]:
    """Kind and shape of each collective in a decode step."""
    text = lowered(runner).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return [f"{kind} {shape}" for shape, kind in re.findall(rf"= (\S+?)(?:\{{\S*)? ({kinds})\(", text)]


@dataclass(frozen=True)
class Asked(Tuning):
    """A table that knows nothing, and remembers what it was asked for."""

    shapes: set[tuple[str, int, int]] = field(default_factory=set, compare=False)

    def find(
        self, format: str, kind: str, weight: tuple[int, int], tokens: int, *, streams: bool = True
    ) -> None:
        self.shapes.add((kind, *weight))


def products_asked_for(path: Path, mesh: jax.sharding.Mesh) -> bool:
    """Whether a decode step looks up the shapes that `bench tune --tp` measures."""
    asked = Asked()
    runner = PagedRunner(load_model(path, mesh=mesh, tuning=asked), mesh=mesh)
    lowered(runner)
    wanted = tune.products(runner.model.config, axis_size(mesh, "tp")).values()
    return asked.shapes == {(p.kind, p.out, p.inner) for p in wanted if not p.normed}


def tuned(model: LoadedModel, tp: int) -> Tuning:
    """As if the hand-written products were fastest for what one of `tp` devices does."""

    def fastest(shape: tune.Shape) -> Measurement:
        splits = 2 if shape.kind == "parts" and shape.inner % 16 == 0 else 1
        tiling = Tiling(32, 8, splits, 4, 2)
        return Measurement("w16a16", shape.kind, shape.out, shape.inner, 8, tiling, 1.0, 2.0)

    return Tuning(tuple(map(fastest, tune.products(model.config, tp).values())))


def tuned_errors(path: Path, mesh: jax.sharding.Mesh) -> list[float]:
    """How far hand-written products change a step's logits; their parts travel as they are, or summed."""
    load = partial(load_model, path, dtype="bfloat16", mesh=mesh, backend="pallas_interpret")
    found, limit = [], collectives_module.ONE_SHOT_BYTES
    for table, most in ((False, limit), (True, limit), (True, 0)):
        collectives_module.ONE_SHOT_BYTES = most
        model = load()
        model = load(tuning=tuned(model, axis_size(mesh, "tp"))) if table else model
        found.append(PagedRunner(model, mesh=mesh).decode({0: (7, 0), 1: (8, 0)})[1])
        jax.clear_caches()
    collectives_module.ONE_SHOT_BYTES = limit
    found.append(logits_with_peers(load, mesh))
    plain, *others = found
    return [float(np.linalg.norm(logits - plain) / np.linalg.norm(plain)) for logits in others]


def logits_with_peers(load: Callable[..., LoadedModel], mesh: jax.sharding.Mesh) -> np.ndarray:
    """The same where sums wait for the next norm, whatever a row's size."""
    for module in (residual, sharded):
        module.why_not_peers = lambda *_: None
    model = load()
    peers = replace(tuned(model, axis_size(mesh, "tp")), all_reduce="pallas")
    runner = PagedRunner(load(tuning=peers), mesh=mesh)
    found = runner.decode({0: (7, 0), 1: (8, 0)})[1]
    assert (chosen(runner, True) == chosen(runner, False)).all()
    addresses = np.asarray(runner.peers)[:, OWN:].copy().view(np.int64)
    at = [shard.data.unsafe_buffer_pointer() for shard in runner.memory.workspaces.addressable_shards]
    assert (addresses == at).all(), (addresses, at)
    return found


def chosen(runner: PagedRunner, peers: bool) -> np.ndarray:
    """The best token of random rows, one of them NaN, by peers or by XLA."""
    hidden = np.random.default_rng(3).standard_normal((40, runner.model.config.hidden_size))
    hidden[5] = np.nan
    table = runner.peers if peers else None
    greedy = jax.jit(lambda leaves, hidden: runner.model.merge(leaves, table).greedy(hidden))
    return np.asarray(greedy(runner.model.leaves, hidden.astype(runner.model.dtype)))


def add_head(path: Path, folder: str) -> tuple[Path, np.ndarray]:
    """A converted checkpoint, tied by its config, with a head of its own: the embedding turned round."""
    plain = load_file(path / "model.safetensors")
    rows = plain["model.embed_tokens.weight"]
    copy = Path(shutil.copytree(path, f"{folder}/hf"))
    save_file(plain | {"lm_head.weight": rows[::-1].copy()}, copy / "model.safetensors")
    return orbax.save(f"{folder}/converted", named_leaves(load_model(copy)), {}, copy), rows


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """The size of each piece that is read of converted weights meanwhile."""
    found: list[int] = []
    original = orbax.read_array

    def counted(*args: object) -> np.ndarray:
        piece = original(*args)
        found.append(piece.nbytes)
        return piece

    orbax.read_array = counted
    yield found
    orbax.read_array = original


def compare(name: str, folder: str) -> None:
    path = save_checkpoint(name, f"{folder}/hf")
    ids = np.random.default_rng(0).integers(3, 257, TOTAL).tolist()
    want = hf_logits(path, ids, PROMPT)
    single = load_model(path)
    converted = orbax.save(f"{folder}/converted", named_leaves(single), {}, path)
    untied, rows = add_head(path, f"{folder}/untied")
    for tp in (1, 2, 4):
        mesh = make_mesh(tp)
        model = load_model(path, mesh=mesh)
        got, runner = logits(model, ids, mesh)
        with bytes_read() as read:
            again = load_model(converted, mesh=mesh)
        alike = [
            x.sharding == y.sharding and np.array_equal(x, y)
            for x, y in zip(model.leaves, again.leaves, strict=True)
        ]
        head = named_leaves(load_model(untied, mesh=mesh))["lm_head.weight"]
        found = {
            "tp": tp,
            "head_kept": bool(np.array_equal(np.asarray(head)[:257], rows[::-1])),
            "kv_heads": model.config.layers[0].mixer.held_kv_heads(tp),
            "error": float(np.abs(got - want).max() / np.abs(want).max()),
            "converted_alike": all(alike),
            "read": sum(read) / sum(leaf.nbytes for leaf in single.leaves),
            "held": sum(leaf.nbytes for leaf in again.leaves) / sum(leaf.nbytes for leaf in single.leaves),
            "largest_read": max(read) / max(leaf.nbytes for leaf in single.leaves),
            "collectives": collectives(runner) if tp == 4 else [],
            "tunable": products_asked_for(path, mesh),
            "tuned_errors": tuned_errors(path, mesh) if tp == 2 else [],
        }
        print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with tempfile.TemporaryDirectory() as scratch:
        compare(sys.argv[1], scratch)
