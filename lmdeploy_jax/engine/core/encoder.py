"""Images on the device: runs of the vision model, and the rows that they gave, held for whoever asks again.

All rows stand in one array, `image_rows` of the state, so that a step's tokens name theirs by number,
whatever images they are of, and nothing is copied together before a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from lmdeploy_jax.converters.vision import LoadedVisionModel
from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.engine.core.encoder_runs import Run, Wanted, plan_runs
from lmdeploy_jax.engine.core.program import Ladder, Program, Programs
from lmdeploy_jax.engine.core.scheduler import Chunk
from lmdeploy_jax.engine.core.state import Leaves, Update
from lmdeploy_jax.prompt import Span, SpanImage
from lmdeploy_jax.vision.attention import DENSE, QUERIES
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.inputs import VisionInputs
from lmdeploy_jax.vision.packing import output_of, pack, result_index
from lmdeploy_jax.vision.processor import View


class Touched(NamedTuple):
    """Tokens of a step that stand for rows of an image: where they are in the step, which rows they have."""

    content_hash: bytes
    image: SpanImage
    tokens: np.ndarray
    rows: np.ndarray


class Encoder:
    """Encodes the images that a step needs and the device does not hold. On the engine's thread."""

    def __init__(self, programs: Programs, vision: LoadedVisionModel, buckets: Buckets) -> None:
        self._vision, self._state = vision, programs.state
        self._dump = self._state.image_capacity
        self._programs = programs
        self._buckets = buckets
        self._runs = Ladder(buckets.encoder, self._program)
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()  # by content, the least recent first
        self._free: list[int] = []
        self.forget()

    def _program(self, size: int) -> Program:
        config, replicated = self._vision.config, self._state.replicated
        views = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=replicated),
            pack(config, [_blank(config)], size, output_of(config, size)),
        )
        function, writes = partial(encode, vision=self._vision), ("image_rows",)
        places = self._state.ints(len(views.output))
        return self._programs.add("encode", function, size=size, writes=writes, views=views, places=places)

    def warm_up(self) -> None:
        """Run every program once, for nobody."""
        config, nothing = self._vision.config, np.empty(0, np.int32)
        for size in self._runs:
            self._run(Run([_blank(config)], size, nothing, nothing))

    def forget(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self._free = list(range(self._dump))

    def index(self, chunks: Sequence[Chunk]) -> np.ndarray | None:
        """Which of the state's `image_rows` each token of a step has, int32, -1 where it has its own
        embedding; None where all have. Images that are not held are encoded.
        """
        touched = list(_touched(chunks))
        if not touched:
            return None
        index = np.full(sum(chunk.count for chunk in chunks), -1, np.int32)
        places = self._places({each.content_hash: each.image for each in touched}, touched)
        for each in touched:
            index[each.tokens] = places[each.content_hash][each.rows]
        return index

    def _places(self, images: Mapping[bytes, SpanImage], touched: list[Touched]) -> dict[bytes, np.ndarray]:
        """Where the rows of each image stand now."""
        for content in images.keys() & self._held.keys():
            self._held.move_to_end(content)
        missing = {content: image for content, image in images.items() if content not in self._held}
        needed = sum(len(np.unique(image.rows)) for image in missing.values())
        while needed > len(self._free) and self._held.keys() - images.keys():
            _, places = self._held.popitem(last=False)
            self._free += np.unique(places).tolist()
        if needed > len(self._free):
            return self._only(images, touched)
        every = {content: np.ones(len(image.rows), bool) for content, image in missing.items()}
        self._held |= self._encode(missing, every)
        return {content: self._held[content] for content in images}

    def _only(self, images: Mapping[bytes, SpanImage], touched: list[Touched]) -> dict[bytes, np.ndarray]:
        """Of images too large to be held together: the rows that this step needs, which are fewer than its
        tokens, held for no other.
        """
        self.forget()
        wanted = {content: np.zeros(len(image.rows), bool) for content, image in images.items()}
        for each in touched:
            wanted[each.content_hash][each.rows] = True
        places = self._encode(images, wanted)
        self.forget()
        return places

    def _encode(
        self, images: Mapping[bytes, SpanImage], wanted: Mapping[bytes, np.ndarray]
    ) -> dict[bytes, np.ndarray]:
        """Start the runs of images -> where those of the rows of each stand that are wanted."""
        runs, found = [], {}
        for content, image in images.items():
            unique, inverse = np.unique(image.rows, return_inverse=True)
            used = np.unique(inverse[wanted[content]])
            places = np.full(len(unique), self._dump, np.int32)
            places[used], self._free = self._free[: len(used)], self._free[len(used) :]
            runs.append(Wanted(image, unique[used], places[used]))
            found[content] = places[inverse]
        for run in plan_runs(self._vision.config, runs, self._buckets):
            self._run(run)
        return found

    def _run(self, run: Run) -> None:
        """Start it."""
        config, program = self._vision.config, self._runs.fit(run.size)
        output = output_of(config, program.size)
        inputs = pack(config, run.views, program.size, output)
        where = np.full(len(inputs.output), self._dump, np.int32)
        where[result_index(run.rows, 0, output)] = run.places
        program(views=inputs, places=where)


def _touched(chunks: Sequence[Chunk]) -> Iterator[Touched]:
    first = 0
    for chunk in chunks:
        prompt, stop = chunk.sequence.request.prompt, chunk.start + chunk.count
        for span, image in zip(prompt.spans, prompt.images, strict=False):
            if span.start < stop and chunk.start < span.stop:
                yield from _within(span, image, chunk, first)
        first += chunk.count


def _within(span: Span, image: SpanImage, chunk: Chunk, first: int) -> Iterator[Touched]:
    """Those of the span's tokens that the chunk has, which begins at token `first` of the step."""
    tokens = image.places + (span.start - chunk.start)
    rows = np.flatnonzero((tokens >= 0) & (tokens < chunk.count))
    if len(rows):
        yield Touched(span.content_hash, image, first + tokens[rows], rows)


def _blank(config: VisionModelConfig) -> View:
    side = config.tower.grid or config.processor.merge
    return View(np.zeros((side**2, prod(config.tower.patch_shape)), np.uint8), (side, side))


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
    rows = vision.merge(vision_leaves)(views)[0].astype(image_rows.dtype)
    return None, Update(image_rows=image_rows.at[places].set(rows))
