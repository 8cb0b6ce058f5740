"""Memory in which the GPUs of a process store what the others wait for; see `pallas_kernels.peer_memory`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lmdeploy_jax.pallas_kernels.workspace import EMPTY, HEADER_BYTES, OWN, Workspace
from lmdeploy_jax.parallel.mesh import model_axes, model_devices


@dataclass(frozen=True)
class PeerMemory:
    """A workspace a device, which programs reach by its address alone: it must live as long as they run."""

    workspaces: Array
    """i32 [n, words], cut by device."""
    table: Array
    """i32 [n, OWN + 2n], cut by device: its rank, its workspace's address in two halves, and everybody's."""

    @classmethod
    def allocate(cls, mesh: Mesh, size: int, dtype: DTypeLike) -> PeerMemory:
        """For rows of `size` elements."""
        spec = table_spec(mesh)
        devices, columns = spec.shape
        words = Workspace.of(columns, size, dtype).nbytes // 4
        workspaces = jax.jit(partial(_empty, devices, words), out_shardings=spec.sharding)()
        workspaces.block_until_ready()  # a peer may store at once, and nothing may empty that later
        return cls(workspaces, jax.device_put(_table(workspaces), spec.sharding))


def _empty(devices: int, words: int) -> Array:
    """No number was counted yet, and no packet has come."""
    return jnp.where(jnp.arange(words) < HEADER_BYTES // 4, 0, jnp.full((devices, words), EMPTY))


def why_not_reached(devices: Sequence[jax.Device]) -> str | None:
    """Why devices cannot store into each other's memory, or None if they can, or if there is but one."""
    if len({device.process_index for device in devices}) > 1:
        return "the devices belong to several processes"
    apart = [pair for pair in permutations(devices, 2) if not _reaches(*pair)]
    return f"{apart[0][0]} cannot address the memory of {apart[0][1]}" if apart else None


def _reaches(device: jax.Device, peer: jax.Device) -> bool:
    """As the driver says; XLA lets those of a process that can. On a CPU all memory is one."""
    if device.platform == "cpu":
        return True
    can = ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuDeviceCanAccessPeer(ctypes.byref(can), device.local_hardware_id, peer.local_hardware_id)
    return not failed and bool(can.value)


def table_spec(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a mesh's table."""
    devices = model_devices(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(model_axes(mesh)))
    return jax.ShapeDtypeStruct((devices, OWN + 2 * devices), jnp.int32, sharding=sharding)


def _table(workspaces: Array) -> np.ndarray:
    by_rank = sorted(workspaces.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    addresses = np.array([shard.data.unsafe_buffer_pointer() for shard in by_rank], np.int64)
    halves = addresses.view(np.int32).reshape(-1, 2)  # the low one first
    ranks = np.arange(len(halves), dtype=np.int32)[:, None]
    everybody = np.broadcast_to(halves.reshape(1, -1), (len(halves), halves.size))
    return np.concatenate([ranks, halves, everybody], axis=1)
