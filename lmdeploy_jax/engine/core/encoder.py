"""Images on the device: runs of the vision model, and the rows that they give.

All rows stand in one array, `image_rows` of the state, so that a step's tokens name theirs by number,
whatever images they are of, and nothing is copied together before a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import jax
import numpy as np
from jax import Array

from lmdeploy_jax.cache.encoder_cache import EncoderRun, ViewRows
from lmdeploy_jax.converters.vision import LoadedVisionModel
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.program import Ladder, Program, Programs
from lmdeploy_jax.engine.core.state import Leaves, Update
from lmdeploy_jax.engine.core.step import Step
from lmdeploy_jax.pallas_kernels.encoder_attention.xla import DENSE, QUERIES
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.packing import output_of, pack, result_index
from lmdeploy_jax.vision.processor import View


class Encoder:
    """Runs the vision model for the steps that read its rows. On the engine's thread.

    What is encoded, and where its rows stand, is planned by `cache.encoder_cache`.
    """

    def __init__(self, programs: Programs, vision: LoadedVisionModel, buckets: Buckets) -> None:
        self._vision, self._state = vision, programs.state
        self._capacity = self._state.image_capacity
        self._programs = programs
        self._runs = Ladder(buckets.encoder, self._program)
        self.forget()

    def _program(self, size: int) -> Program:
        config, replicated = self._vision.config, self._state.replicated
        views = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated),
            pack(config, [_blank(config)], size, output_of(config, size)),
        )
        function, writes = partial(encode, vision=self._vision), ("image_rows",)
        places = self._state.ints(len(views.output))
        inputs = {"views": views, "places": places, "compiler_options": compiler_options(config)}
        return self._programs.add("encode", function, size=size, writes=writes, **inputs)

    def warm_up(self) -> None:
        """Run every program once, for nobody."""
        for program in self._runs.values():
            self._run(program, [_blank(self._vision.config)], [])

    def forget(self) -> None:
        """The rows are gone from the device, the learned ones too."""
        self._has_learned = False

    def prepare(self, step: Step) -> None:
        """Start the runs that must come before a step."""
        for run in step.encoder_runs:
            self._encode(run)
        if not self._has_learned and self._vision.config.learned and step.embedding_index is not None:
            self._run(self._runs.fit(1), [_blank(self._vision.config)], [])

    def _encode(self, run: EncoderRun) -> None:
        views = [View(each.image.patches[each.number], each.image.grid) for each in run.views]
        self._run(self._runs.fit(run.size), views, run.views)

    def _run(self, program: Program, views: list[View], wanted: Sequence[ViewRows]) -> None:
        """Put the rows that are wanted of a run where they are to stand, and the learned ones in any case."""
        config, first = self._vision.config, 0
        output = output_of(config, program.size)
        inputs = pack(config, views, program.size, output)
        where = np.full(len(inputs.output), self._capacity, np.int32)
        for each in wanted:
            within = each.rows - each.number * each.image.view_rows
            where[result_index(within, first, output)] = each.places
            first += each.image.view_rows
        learned = -1 - np.arange(config.learned)
        where[result_index(learned, 0, output)] = self._capacity + learned
        program(views=inputs, places=where)
        self._has_learned = True


def compiler_options(config: VisionModelConfig) -> dict[str, bool]:
    """XLA adds residuals within cuBLASLt's products, but not where Triton's are candidates."""
    return {"xla_gpu_enable_triton_gemm": False} if config.tower.fused else {}


def _blank(config: VisionModelConfig) -> View:
    side = config.tower.grid or config.processor.merge
    shape = (side**2, prod(config.tower.patch_shape))
    return View(np.zeros(shape, config.processor.dtype), (side, side))


def run_bytes(config: VisionModelConfig, size: int, itemsize: int) -> int:
    """Memory that one run takes besides the weights, roughly."""
    tower = config.tower
    if tower.grid is None:
        patches, seen = size, min(size, QUERIES) * min(size, DENSE) // size
    else:
        seen = tower.grid**2 + tower.class_token
        patches = size * seen
    scores = 2 * 4 * tower.heads * seen
    return patches * ((8 * tower.width + 2 * tower.mlp_width) * itemsize + scores)


def encode(
    vision_leaves: Leaves, image_rows: Array, views: VisionInputs, places: Array, *, vision: LoadedVisionModel
) -> tuple[None, Update]:
    """Put the rows of a run at `places` i32 [M] of `image_rows`."""
    rows = vision.merge(vision_leaves)(views).astype(image_rows.dtype)
    return None, Update(image_rows=image_rows.at[:, places].set(rows))
