"""Calibration's tokens on their way through the layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.lite.layer import Found, LayerModel, Windows
from lmdeploy_jax.lite.source import EMBEDDING, Source


class Stream:
    """The residual stream of all windows [samples, length], `batch_size` of them at a time."""

    def __init__(self, source: Source, windows: np.ndarray, batch_size: int, dtype: Any) -> None:
        self._count = batch_size
        samples, self._length = windows.shape
        table = source.leaves[EMBEDDING]
        used, places = np.unique(windows, return_inverse=True)
        rows = np.concatenate([table.read((slice(i, i + 1),), dtype) for i in used.tolist()])
        multiplier = jnp.asarray(source.config.embedding_multiplier, dtype)
        embedded = jnp.asarray(rows) * multiplier
        places = places.reshape(windows.shape)
        self._parts = [
            embedded[places[first : first + batch_size].reshape(-1)]
            for first in range(0, samples, batch_size)
        ]

    def observe(self, model: LayerModel, arrays: Mapping[str, Array]) -> Found:
        """What the linear layers of a layer are given."""
        return self._run(model, arrays)[1]

    def advance(self, model: LayerModel, arrays: Mapping[str, Array]) -> Found:
        """The same, and the stream is that behind the layer."""
        self._parts, found = self._run(model, arrays)
        return found

    def _run(self, model: LayerModel, arrays: Mapping[str, Array]) -> tuple[list[Array], Found]:
        parts, found = [], None
        for part in self._parts:
            out, seen = model.run(arrays, part, Windows(len(part) // self._length, self._length))
            found = seen if found is None else _joined(found, seen)
            parts.append(out)
        return parts, found or {}


@partial(jax.jit, donate_argnums=0)
def _joined(one: Found, other: Found) -> Found:
    return {name: one[name].joined(other[name]) for name in one}
