"""The tokens that a model is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """Token ids [samples, length], how many samples are run at a time, and their origin."""

    windows: np.ndarray
    batch_size: int
    source: str

    def __str__(self) -> str:
        samples, length = self.windows.shape
        return f"{samples} samples of {length} tokens, {self.source}"
