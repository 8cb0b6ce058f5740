"""Sampling batches for tests: name what differs from greedy-off defaults, broadcast over the rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.sampling.params import SamplingBatch

_DEFAULTS = {
    "temperature": np.float32(1),
    "top_k": np.int32(0),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "seed": np.uint32(0),
    "step": np.int32(0),
    "repetition": np.float32(1),
    "presence": np.float32(0),
    "frequency": np.float32(0),
}


def make_batch(rows: int, **fields: object) -> SamplingBatch:
    """Scalars or lists of `rows` values per field, in the field's dtype."""
    assert fields.keys() <= _DEFAULTS.keys()
    columns = {
        name: np.broadcast_to(np.asarray(fields.get(name, default), default.dtype), (rows,))
        for name, default in _DEFAULTS.items()
    }
    return SamplingBatch(**{name: jnp.asarray(column) for name, column in columns.items()})
