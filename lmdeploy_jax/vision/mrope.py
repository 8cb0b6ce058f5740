"""Positions of time, row and column for RoPE in the language models of Qwen-VL and GLM-V (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VisionGrid:
    """An image or a video among a prompt's tokens.

    start: its first token. frames, rows, columns: of tokens; an image has one frame.
    interval: positions from a frame to the next, a fraction of which is cut off (Qwen2.5-VL's tokens per
        second times seconds per frame).
    """

    start: int
    rows: int
    columns: int
    frames: int = 1
    interval: float = 1.0

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.frames * self.rows * self.columns

    def positions(self) -> np.ndarray:
        """int32 [3, length], counted from where the grid begins."""
        time = (np.arange(self.frames) * self.interval).astype(np.int64)
        grid = np.meshgrid(time, np.arange(self.rows), np.arange(self.columns), indexing="ij")
        return np.stack(grid).reshape(3, -1).astype(np.int32)


def mrope_positions(length: int, grids: Sequence[VisionGrid]) -> tuple[np.ndarray, int]:
    """Positions int32 [3, length] (time, row, column) of a prompt's tokens, and what is added to the number
    of a token behind the prompt to give its position.

    A text token has one position on all axes. A grid begins at the next position on all three; the text after
    it goes on behind its largest. Grids are in order and do not overlap.
    """
    parts, done, position = [], 0, 0
    for grid in grids:
        parts += [_text(position, grid.start - done)]
        position += grid.start - done
        parts.append(position + grid.positions())
        position = int(parts[-1].max()) + 1
        done = grid.start + grid.length
    parts.append(_text(position, length - done))
    position += length - done
    return np.concatenate(parts, axis=1).astype(np.int32), position - length


def _text(first: int, count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + count, dtype=np.int32), (3, count))
