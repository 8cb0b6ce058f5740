"""Run by test_quantised.py with four virtual CPU devices: prints one JSON line of findings a case."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np

from lmdeploy_jax.bench import checkpoint
from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.parallel.mesh import make_mesh
from tests.converters.formats.packers import CASES, quantise_folder
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import save_checkpoint

IDS = list(range(3, 40))
RUNS = {"awq": (1, 2, 4), "ct_int8": (1, 2)}


def logits(model: LoadedModel, mesh: jax.sharding.Mesh) -> np.ndarray:
    (found,) = PagedRunner(model, mesh=mesh).ragged([(0, 0, IDS, len(IDS))])
    return found


def converted_alike(folder: Path, model: LoadedModel, mesh: jax.sharding.Mesh) -> bool:
    """Whether a converted checkpoint gives the same leaves, cut as this mesh needs them."""
    again = load_model(folder, mesh=mesh, dequantise=False)
    assert again.skeleton.formats == model.skeleton.formats
    pairs = zip(model.leaves, again.leaves, strict=True)
    return all(x.sharding == y.sharding and np.array_equal(x, y) for x, y in pairs)


def compare(kind: str, scratch: Path) -> None:
    plain = save_checkpoint("qwen2", scratch / "plain")
    quantise_folder(plain, scratch / "quantised", scratch / "dense", CASES[kind])
    want = logits(load_model(scratch / "dense"), make_mesh(1))
    single = load_model(scratch / "quantised", dequantise=False)
    formats = {name: asdict(held) for name, held in single.skeleton.formats.items()}
    meta = {"formats": formats}
    converted = orbax.save(scratch / "converted", named_leaves(single), meta, scratch / "quantised")
    for tp in RUNS[kind]:
        mesh = make_mesh(tp)
        model = load_model(scratch / "quantised", mesh=mesh, dequantise=False)
        got = logits(model, mesh)
        found = {
            "tp": tp,
            "error": float(np.abs(got - want).max() / np.abs(want).max()),
            "held": len(model.skeleton.formats),
            "converted": converted_alike(converted, model, mesh),
        }
        print(json.dumps(found), flush=True)


def deal_out(backend: str, scratch: Path) -> None:
    """Experts in MXFP4 with biases, in two parts of which two devices share each, or one has all."""
    folder = checkpoint.make("tiny-gpt-oss", scratch, model_format="mxfp4")
    how = {"dtype": "float32", "dequantise": False, "backend": backend}
    want = logits(load_model(folder, **how), make_mesh(1))
    for tp in (2,) if backend == "xla" else (2, 4):
        mesh = make_mesh(tp, ep=2)
        got = logits(load_model(folder, mesh=mesh, **how), mesh)
        print(
            json.dumps({"tp": tp, "error": float(np.abs(got - want).max() / np.abs(want).max())}), flush=True
        )


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with tempfile.TemporaryDirectory() as folder:
        do = compare if sys.argv[1] in RUNS else deal_out
        do(sys.argv[1], Path(folder))
