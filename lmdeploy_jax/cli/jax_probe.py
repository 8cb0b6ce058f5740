"""What JAX sees, printed as JSON: run as its own process, so that a crash inside a driver can be reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Print one JSON object; each part that fails holds the error instead."""
    parts: dict[str, Callable[[], Any]] = {
        "devices": _devices,
        "runtime": _runtime,
        "kernel backends": _kernel_backends,
    }
    print(json.dumps({name: _safely(part) for name, part in parts.items()}))


def _safely(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def _devices() -> list[str]:
    import jax

    return [_device(device) for device in jax.devices()]


def _device(device: Any) -> str:
    stats = device.memory_stats() or {}
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB usable" if "bytes_limit" in stats else ""
    capability = getattr(device, "compute_capability", None)
    level = f", compute capability {capability}" if capability else ""
    return f"{device.platform}:{device.id} {device.device_kind}{level}{memory}"


def _runtime() -> str:
    import jax

    return " ".join(jax.devices()[0].client.platform_version.split())


def _kernel_backends() -> dict[str, str]:
    import jax

    from lmdeploy_jax.pallas_kernels.registry import why_not

    reason = why_not(jax.devices()[0].platform, 128)
    return {"xla": "usable", "pallas": f"not usable: {reason}" if reason else "usable"}


if __name__ == "__main__":
    main()
