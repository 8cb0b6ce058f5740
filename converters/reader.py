"""What reads a checkpoint's tensors, wherever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.slicing import Index


class TensorReader(Protocol):
    """The tensors of a checkpoint folder, by name and by slice; safe to use from several threads."""

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in file order."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor. CheckpointError if there is none of that name."""

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The slice `index` (step 1) of a tensor."""

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Reads the slice `index` into `out` (the slice's shape), converted to the dtype of `out`."""
