"""Greedy tokens of every family, kept from before a change of the house, on four virtual CPU devices:

    python -m tests.models.record           compares with what is kept
    python -m tests.models.record --write   keeps what comes out now

Every family runs on both backends (the kernels interpreted) and on one, two and four devices. transformers is
no part of this: what it says is the other tests' affair.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).parent.parent / "data" / "greedy.json"
PROMPT, COUNT = 70, 32
BACKENDS = {"xla": (1, 2, 4), "pallas_interpret": (1, 2)}


def tokens_of(folder: Path, backend: str, tp: int) -> list[int]:
    """What the model appends to a fixed prompt; one chunk, then a token at a time."""
    import numpy as np

    from lmdeploy_jax.converters.load import load_model
    from lmdeploy_jax.parallel.mesh import make_mesh
    from tests.models.paged import PagedRunner

    mesh = make_mesh(tp)
    model = load_model(folder, mesh=mesh, backend=backend)
    ids = np.random.default_rng(0).integers(3, 257, PROMPT).tolist()
    runner = PagedRunner(model, mesh=mesh)
    (logits,) = runner.ragged([(0, 0, ids, PROMPT)])
    drawn = [int(logits[-1].argmax())]
    while len(drawn) < COUNT:
        logits = runner.decode({0: (drawn[-1], PROMPT + len(drawn) - 1)})[0]
        drawn.append(int(logits.argmax()))
    return drawn


def findings() -> Iterator[tuple[str, list[int]]]:
    """Each case's name and tokens."""
    from tests.oracle import CONFIGS, save_checkpoint

    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_checkpoint(name, scratch)
            for backend, sizes in BACKENDS.items():
                for tp in sizes:
                    try:
                        yield f"{name} {backend} tp{tp}", tokens_of(folder, backend, tp)
                    except ValueError as error:  # sizes that cannot be dealt out
                        print(f"{name} {backend} tp{tp}: {str(error)[:90]}", file=sys.stderr)


def main() -> int:
    known = {} if "--write" in sys.argv else json.loads(FILE.read_text())
    found = {}
    for case, tokens in findings():
        found[case] = tokens
        same = known.get(case) == tokens
        print(
            case,
            "kept" if not known else "same" if same else f"OTHER: {tokens} for {known.get(case)}",
            flush=True,
        )
    if not known:
        rows = [f"{json.dumps(case)}: {json.dumps(tokens)}" for case, tokens in found.items()]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return int(bool(known) and found != known)


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sys.exit(main())
