"""The nodes of an engine: one controller process of JAX each, of which the first leads.

All run the same programs in the same order. The leader schedules and tells the others what it dispatches,
before it does so itself; what they compute is dropped there, and read on the leader.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.engine.nodes.channel import SILENCE, Channel, bounded
from lmdeploy_jax.engine.nodes.settings import address_of, check_nodes
from lmdeploy_jax.engine.progress import announce
from lmdeploy_jax.errors import ConfigError, EngineError
from lmdeploy_jax.logs import logger

OWN = (
    "node_rank",
    "download_dir",
    "revision",
    "compile_cache_dir",
)  # options that may differ from node to node
KEY_BYTES = 32
_PORT_BYTES = 2
SHUTDOWN = 10  # seconds that nodes wait for each other as they end
LAST_WORDS = 2.0  # seconds in which the leader's clients are told of a lost node, before its process ends


class OneNode:
    """All of the engine's devices belong to this process."""

    count = 1
    leads = True
    failure: str | None = None
    """Which node was lost, and how."""

    @property
    def leads_others(self) -> bool:
        return self.leads and self.count > 1

    def exchange(self, value: Any) -> list[Any]:
        """What every node has given, by rank."""
        return [value]

    def tell(self, message: Any) -> None:
        """The leader: to the others, in this order. Raises EngineError where one is lost."""

    def close(self, failure: str | None = None) -> None:
        """Nothing more is to be told; what follows ends then, with an error where the engine failed."""


class Closed:
    """The leader's last message."""

    def __init__(self, failure: str | None) -> None:
        self.failure = failure


class Leader(OneNode):
    """Node 0."""

    def __init__(self, listener: socket.socket, key: bytes, count: int) -> None:
        self.count = count
        accepted = dict(self._accepted(listener, key) for _ in range(1, count))
        self._channels = [accepted[rank] for rank in sorted(accepted)]

    def _accepted(self, listener: socket.socket, key: bytes) -> tuple[int, Channel]:
        while True:
            connection = Connection(listener.accept()[0].detach())
            bounded(connection, SILENCE)  # whoever it is may say nothing
            try:
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
            except (AuthenticationError, EOFError, OSError):
                connection.close()  # none of the nodes
                continue
            rank = connection.recv()
            return rank, Channel(connection, f"node {rank}", self._end)

    def _end(self, cause: str) -> None:
        """A program that waits for the lost node cannot be interrupted, so that the process ends."""
        if self.failure is None:
            self.failure = cause
            logger.error("%s: the engine ends", cause)
            time.sleep(LAST_WORDS)
            os._exit(1)

    def exchange(self, value: Any) -> list[Any]:
        values = [value, *(channel.receive() for channel in self._channels)]
        self.tell(values)
        return values

    def tell(self, message: Any) -> None:
        for channel in self._channels:
            channel.send(message)

    def close(self, failure: str | None = None) -> None:
        for channel in self._channels:
            with suppress(EngineError):  # it has gone, and so it ends anyway
                channel.send(Closed(failure))
            channel.close()


class Follower(OneNode):
    """Any other node."""

    leads = False

    def __init__(self, address: tuple[str, int], key: bytes, rank: int, count: int) -> None:
        self.count = count
        try:
            connection = Client(address, authkey=key)
        except OSError as error:
            raise EngineError(
                f"node {rank} has no way to node 0 at {address[0]}:{address[1]}, from where it is led: "
                f"{error}. Let the nodes connect to each other at every port."
            ) from error
        connection.send(rank)
        self._channel = Channel(connection, "node 0", self._end)

    def _end(self, cause: str) -> None:
        """The main thread is told first, which may wait for a program that never ends."""
        self.failure = cause
        logger.error("%s: this node ends", cause)
        time.sleep(LAST_WORDS)
        os._exit(1)

    def exchange(self, value: Any) -> list[Any]:
        self._channel.send(value)
        return self._channel.receive()

    def close(self, failure: str | None = None) -> None:
        self._channel.drop()

    def next_message(self) -> Any:
        """Waits for what the leader tells; None once it has closed. Raises EngineError where it has failed,
        or is lost.
        """
        message = self._channel.receive()
        if not isinstance(message, Closed):
            return message
        if message.failure is not None:
            raise EngineError(f"node 0 has failed: {message.failure}")
        return None


def join(config: JaxEngineConfig, folder: Path, *, progress: bool) -> OneNode:
    """Find the other nodes and agree with them; to be called before JAX looks for devices.

    folder: the checkpoint. Raises ConfigError for options that cannot work, or differ between the nodes,
    EngineError where the nodes do not find each other.
    """
    check_nodes(config)
    if config.nnodes == 1:
        return OneNode()
    others = config.nnodes - 1
    announce(progress, f"node {config.node_rank}: waiting for {others} more at {config.dist_init_addr}")
    _initialize(config)
    nodes = _connected(config)
    _check_alike(nodes.exchange(_facts(config, folder)))
    return nodes


def _initialize(config: JaxEngineConfig) -> None:
    """One JAX over all nodes, which sees as many devices of each as the engine has there."""
    own = config.tp // config.nnodes
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", own)
    try:
        jax.distributed.initialize(
            config.dist_init_addr,
            config.nnodes,
            config.node_rank,
            local_device_ids=list(range(own)),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=int(SILENCE),
            shutdown_timeout_seconds=SHUTDOWN,
        )
        devices = jax.devices()
    except RuntimeError as error:
        raise EngineError(
            f"The {config.nnodes} nodes have not found each other at dist_init_addr="
            f"{config.dist_init_addr!r}, an address of node 0: {error}"
        ) from error
    found = Counter(device.process_index for device in devices)
    for rank in range(config.nnodes):
        if found[rank] != own:
            raise ConfigError(
                f"tp={config.tp} over nnodes={config.nnodes} needs {own} devices on each node, and node "
                f"{rank} has {found[rank]}: lower tp, or take another node."
            )


def _connected(config: JaxEngineConfig) -> OneNode:
    """The key of the connections is random and travels by JAX, among the nodes alone."""
    if config.node_rank:
        told = _of_leader(bytes(_PORT_BYTES + KEY_BYTES))
        host, port = address_of(config)[0], int.from_bytes(told[:_PORT_BYTES], "big")
        return Follower((host, port), told[_PORT_BYTES:], config.node_rank, config.nnodes)
    key = os.urandom(KEY_BYTES)
    with socket.create_server(("", 0), backlog=config.nnodes) as listener:
        port = listener.getsockname()[1]
        _of_leader(port.to_bytes(_PORT_BYTES, "big") + key)
        return Leader(listener, key, config.nnodes)


def _of_leader(data: bytes) -> bytes:
    """What the leader has given, of that length on every node."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))).tobytes()


def _facts(config: JaxEngineConfig, folder: Path) -> dict[str, object]:
    """What must be the same on every node, by what an error calls it."""
    options = {name: value for name, value in asdict(config).items() if name not in OWN}
    versions = {f"the version of {each}": version(each) for each in ("lmdeploy_jax", "jax", "jaxlib")}
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return options | versions | {"the digest of the checkpoint's config.json": digest}


def _check_alike(facts: list[dict[str, object]]) -> None:
    """Raises ConfigError, on every node the same."""
    first, *others = facts
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise ConfigError(
                    f"{name} is {other[name]!r} on node {rank} and {value!r} on node 0: every node needs the "
                    "same options, versions and checkpoint."
                )


def check_programs(nodes: OneNode, fingerprint: str) -> None:
    """Raises ConfigError, on every node the same, where the nodes would compile other programs."""
    if len(set(nodes.exchange(fingerprint))) > 1:
        raise ConfigError(
            "The nodes would run different programs: give every node the same kind of devices, code, "
            "XLA_FLAGS and times of `bench tune`."
        )
