"""What one run of a vision model reads: arrays of fixed sizes, whatever the pictures' sizes are."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # NumPy's until a run begins, JAX's within it


class VisionInputs(NamedTuple):
    """B sequences of N patches: views of one size side by side, or B = 1 with views of all sizes in a row.

    patches: levels 0...255, uint8 or float32 [B, N, K].
    output: int32 [M], which rows of the projector's result are wanted, in order.
    The others are None where all views are squares of one size:
    segments: int32 [B, N]; patches attend to those of their own segment. Padding has one of its own, -1.
    coordinates: int32 [B, N, 2], row and column of each patch in its view.
    taps, weights: int32 and float32 [B, N, n], entries of the position table and their shares; None too where
        there is no such table.
    """

    patches: Array
    output: Array
    segments: Array | None = None
    coordinates: Array | None = None
    taps: Array | None = None
    weights: Array | None = None
