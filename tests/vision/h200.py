"""InternViT-300M's tower compiled for an H200 without one: `python -m tests.vision.h200`.

Prints a JSON line for each number of tiles; see `tests.pallas_kernels.h200` for what it needs.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.engine.core.encoder import compiler_options
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.families import vision_family
from lmdeploy_jax.vision.model import VisionModel
from lmdeploy_jax.vision.packing import output_of, pack
from lmdeploy_jax.vision.processor import View
from tests.pallas_kernels.h200 import TARGET, outside_command_buffer
from tests.pallas_kernels.programs import as_on_h200

LAYERS, SHAPE, TILES = 2, "internvl2-8b", (1, 13)
FUSED_TILES = (1, 4, 13, 26)


def tower_config() -> VisionModelConfig:
    raw = shapes.read(SHAPE)
    config = vision_family(raw).config(Fields(raw, SHAPE), Fields({}, SHAPE))
    return replace(config, tower=replace(config.tower, layers=LAYERS))


def report(config: VisionModelConfig, tiles: int, sharding: NamedSharding) -> dict[str, object]:
    """Compiles a run of so many tiles and returns its facts."""
    side = config.tower.grid
    views = [View(jnp.zeros((side**2, 588), jnp.uint8), (side, side))] * tiles
    graph, state = nnx.split(
        nnx.eval_shape(lambda: VisionModel(config, dtype=jnp.bfloat16, backend="mosaic"))
    )
    inputs = pack(config, views, tiles, output_of(config, tiles))
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), (state, inputs))
    with tempfile.TemporaryDirectory() as folder:
        run = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} | compiler_options(config)
        run.lower(*specs).compile(compiler_options=options)
        (thunks,) = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        return {
            "program": f"{tiles} tiles" + (", fused" if config.tower.fused else ""),
            "outside_command_buffer": outside_command_buffer(Path(folder)),
            "launches": re.findall(r"^\s+\d+: (k\S+ \[.*?\] \S+)", thunks.read_text(), re.MULTILINE),
        }


def main() -> None:
    jax.devices()  # loads the plugins
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    config = tower_config()
    with as_on_h200():
        for tiles in TILES:
            print(json.dumps(report(config, tiles, sharding)), flush=True)
        fused = replace(config, tower=replace(config.tower, fused=True))
        for tiles in FUSED_TILES:
            print(json.dumps(report(fused, tiles, sharding)), flush=True)


if __name__ == "__main__":
    main()
