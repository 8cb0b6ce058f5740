"""Run by test_families.py with virtual CPU devices: how far a family's logits are from transformers', on some
of them, with experts dealt out in two parts too where there are any, and, of those behind --interpreted,
through interpreted kernels; one JSON line a family.

    python -m tests.parallel.families_program 2,4 minimax_m2 --interpreted gpt_oss
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.models import residual
from lmdeploy_jax.models.mlp_config import MixtureConfig
from lmdeploy_jax.models.tuning import Tuning
from lmdeploy_jax.parallel.mesh import make_mesh
from tests.models.paged import PagedRunner
from tests.oracle import hf_logits, save_checkpoint

PROMPT, TOTAL = 70, 72
PEERS = Tuning(all_reduce="pallas")  # where there are kernels, the next norm adds up over devices


def error(folder: Path, ids: list[int], want: np.ndarray, backend: str, tp: int, ep: int = 1) -> float:
    mesh = make_mesh(tp, ep)
    runner = PagedRunner(load_model(folder, mesh=mesh, backend=backend, tuning=PEERS), mesh=mesh)
    (prefill,) = runner.ragged([(0, 0, ids[:PROMPT], PROMPT)])
    decoded = [runner.decode({0: (ids[i], i)})[0] for i in range(PROMPT, TOTAL)]
    got = np.concatenate([prefill, decoded])
    return float(np.abs(got - want).max() / np.abs(want).max())


def main(devices: list[int], names: list[str], interpreted: list[str]) -> None:
    ids = np.random.default_rng(0).integers(3, 257, TOTAL).tolist()
    for name in names + interpreted:
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_checkpoint(name, scratch)
            want = hf_logits(folder, ids, PROMPT)
            found = {f"tp {tp}": error(folder, ids, want, "xla", tp) for tp in devices}
            layers = read_config(folder).layers
            if any(isinstance(layer.mlp, MixtureConfig) for layer in layers):
                found |= {f"tp {tp}, ep 2": error(folder, ids, want, "xla", tp, 2) for tp in devices}
            if name in interpreted:
                for tp, ep in ((1, 1), (devices[0], 1), (devices[0], 2)):
                    case = folder, ids, want, "pallas_interpret", tp, ep
                    found[f"interpreted, tp {tp}, ep {ep}"] = error(*case)
            print(json.dumps({name: found}), flush=True)
            jax.clear_caches()


if __name__ == "__main__":
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    residual.why_not_peers = lambda *_: None  # rows here are shorter than any kernel's
    tps, *names = sys.argv[1:]
    split = names.index("--interpreted")
    main([int(tp) for tp in tps.split(",")], names[:split], names[split + 1 :])
