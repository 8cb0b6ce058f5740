"""Which views are encoded side by side in one run, and where the rows of its result go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lmdeploy_jax.engine.core.buckets import Buckets
from lmdeploy_jax.prompt import SpanImage
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.packing import size_of
from lmdeploy_jax.vision.processor import View


class Wanted(NamedTuple):
    """Rows of an image that are to be had, each once, and where each is to go: int32 [n] both."""

    image: SpanImage
    rows: np.ndarray
    places: np.ndarray


class Run(NamedTuple):
    """One run of the encoder.

    size: what its views take together.
    rows, places: int32 [n], rows of its result, numbered as `SpanImage.rows` are, and where they go.
    """

    views: list[View]
    size: int
    rows: np.ndarray
    places: np.ndarray


class _Piece(NamedTuple):
    """One view with the rows that are wanted of it, numbered from its first."""

    view: View
    size: int
    tokens: int
    rows: np.ndarray
    places: np.ndarray


def plan_runs(config: VisionModelConfig, images: Iterable[Wanted], buckets: Buckets) -> Iterator[Run]:
    """Runs that give the rows of all images. Views of which nothing is wanted are left out."""
    open_pieces: list[_Piece] = []
    for piece in (piece for wanted in images for piece in _pieces(config, wanted)):
        if open_pieces and sum(each.size for each in (*open_pieces, piece)) > buckets.shared:
            yield _run(open_pieces)
            open_pieces = []
        open_pieces.append(piece)
    if open_pieces:
        yield _run(open_pieces)


def _pieces(config: VisionModelConfig, wanted: Wanted) -> Iterator[_Piece]:
    image, rows = wanted.image, wanted.rows
    size, tokens = size_of(config, image.grid), image.patches.shape[1] // config.processor.merge**2
    # Learned rows are those of any run; the first that there is gives them.
    learned = rows < 0
    for number, patches in enumerate(image.patches):
        own = learned | ((rows >= number * tokens) & (rows < (number + 1) * tokens))
        if own.any():
            within = np.where(rows < 0, rows, rows - number * tokens)[own]
            yield _Piece(View(patches, image.grid), size, tokens, within, wanted.places[own])
        learned = np.zeros_like(learned)


def _run(pieces: list[_Piece]) -> Run:
    first, rows = 0, []
    for piece in pieces:
        rows.append(np.where(piece.rows < 0, piece.rows, piece.rows + first))
        first += piece.tokens
    return Run(
        [piece.view for piece in pieces],
        sum(piece.size for piece in pieces),
        np.concatenate(rows).astype(np.int32),
        np.concatenate([piece.places for piece in pieces]),
    )
