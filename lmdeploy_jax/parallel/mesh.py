"""The device mesh: replicas (`dp`), tensor parallelism (`tp`), expert parallelism (`ep`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from lmdeploy_jax.errors import ConfigError

AXES = ("dp", "tp", "ep")


def make_mesh(tp: int = 1, ep: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the first `tp` of `devices` (default: JAX's own), with `dp` of 1.

    ep: how many parts experts are dealt out in, each of which `tp / ep` devices share. Axis `ep` has that
    size and axis `tp` the rest: what is cut over all devices is cut over both, see `model_axes`.
    Raises ConfigError when there are too few devices, or no such parts.
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
    if ep < 1 or tp % ep:
        raise ConfigError(f"ep={ep} does not divide tp={tp}; choose an ep that does, or leave it out.")
    return Mesh(np.asarray(devices[:tp]).reshape(1, tp // ep, ep), AXES)


def model_axes(mesh: Mesh | None) -> str | tuple[str, ...]:
    """The mesh axes over which the devices that share a model lie."""
    return ("tp", "ep") if axis_size(mesh, "ep") > 1 else "tp"


def model_devices(mesh: Mesh | None) -> int:
    """How many share a model: `tp` of the engine's config."""
    return axis_size(mesh, "tp") * axis_size(mesh, "ep")


def see_gpus_of_copy(rank: int, size: int) -> None:
    """Let this process see those GPUs alone that a copy of the model of that number has, `size` each. To be
    called before JAX looks for devices; says nothing where there are no GPUs.
    """
    mine = range(rank * size, (rank + 1) * size)
    jax.config.update("jax_cuda_visible_devices", ",".join(map(str, mine)))


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)
