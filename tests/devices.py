"""Processes that see several devices where there is but a CPU."""

from __future__ import annotations

import os


def virtual_devices(count: int) -> dict[str, str]:
    """The environment of such a process, with the flags of this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
