"""The engine's steps on several H200s, compiled without one: `python -m tests.parallel.graphs_on_h200`.

Prints a JSON line a program; see `tests.pallas_kernels.h200` for what it needs.
"""

from __future__ import annotations

import json

import jax
from jax.experimental import topologies

from lmdeploy_jax.parallel.mesh import AXES
from tests.engine.h200 import programs_on, report
from tests.pallas_kernels.h200 import TARGET
from tests.pallas_kernels.programs import as_on_h200


def main() -> None:
    jax.devices()  # loads the plugins
    for tp in (2, 4, 8):
        where = {"target_config": TARGET.read_text(), "topology": f"1x1x{tp}"}
        topology = topologies.get_topology_desc("", platform="cuda", **where)
        mesh = topologies.make_mesh(topology, (1, tp, 1), AXES)
        with as_on_h200():
            programs = programs_on(mesh, "llama3-8b", all_reduce="pallas")
            for size in (1, 64):
                name = f"tp {tp} decode_greedy {size}"
                found = report(name, programs["decode_greedy", size], programs.state.cache)
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
