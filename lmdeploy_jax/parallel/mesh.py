"""The device mesh: replicas (`dp`), tensor parallelism (`tp`), expert parallelism (`ep`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lmdeploy_jax.errors import ConfigError

AXES = ("dp", "tp", "ep")


def make_mesh(tp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `tp` of `devices` (default: JAX's own), with `dp` and `ep` of 1.

    Raises ConfigError when there are too few devices.
    """
    devices = jax.devices() if devices is None else devices
    if tp < 1 or tp > len(devices):
        kind = devices[0].platform if len(devices) else "no"
        if len(devices) == 1:
            raise ConfigError(f"tp={tp} needs as many devices, and there is one ({kind}): leave tp out.")
        raise ConfigError(
            f"tp={tp} needs as many devices, and there are {len(devices)} ({kind}); "
            f"choose a tp from 1 to {len(devices)}."
        )
    return Mesh(np.asarray(devices[:tp]).reshape(1, tp, 1), AXES)


def see_gpus_of_copy(rank: int, size: int) -> None:
    """Let this process see those GPUs alone that a copy of the model of that number has, `size` each. To be
    called before JAX looks for devices; says nothing where there are no GPUs.
    """
    mine = range(rank * size, (rank + 1) * size)
    jax.config.update("jax_cuda_visible_devices", ",".join(map(str, mine)))


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)
