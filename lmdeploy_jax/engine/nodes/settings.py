"""What a config must say for several nodes, told before anything is loaded. Without JAX."""

from __future__ import annotations

import logging

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import ConfigError

log = logging.getLogger("lmdeploy_jax")


def check_nodes(config: JaxEngineConfig) -> None:
    """Raises ConfigError for nodes that could not run one engine together."""
    nodes = config.nnodes
    if config.node_rank >= nodes:
        raise ConfigError(
            f"node_rank={config.node_rank} is beyond nnodes={nodes}: the ranks are 0 to {nodes - 1}."
        )
    if nodes == 1:
        if config.dist_init_addr is not None:
            log.warning("dist_init_addr=%r is not used: nnodes is 1", config.dist_init_addr)
        return
    if config.dp > 1:
        raise ConfigError(
            f"dp={config.dp} is not supported with nnodes={nodes}: start a server for each copy, and "
            "`serve proxy` before them."
        )
    if config.tp % nodes:
        raise ConfigError(f"tp={config.tp} devices do not share out evenly over nnodes={nodes} nodes.")
    address_of(config)


def address_of(config: JaxEngineConfig) -> tuple[str, int]:
    """Host and port of node 0. Raises ConfigError where none is given, or it is none."""
    host, _, port = (config.dist_init_addr or "").rpartition(":")
    if not host or ":" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"dist_init_addr={config.dist_init_addr!r} is no address of node 0, which nnodes={config.nnodes} "
            "needs: give the same HOST:PORT on every node, a name or IPv4 address of node 0 and a free port."
        )
    return host, int(port)


def check_leads(config: JaxEngineConfig) -> None:
    """Raises ConfigError for a node that answers nobody, since it follows node 0."""
    if config.node_rank:
        raise ConfigError(
            f"node_rank={config.node_rank}: only node 0 takes requests. Start this one with `lmdeploy_jax "
            f"serve api_server MODEL --nnodes {config.nnodes} --node-rank {config.node_rank} "
            "--dist-init-addr HOST:PORT` and node 0's other engine options."
        )
