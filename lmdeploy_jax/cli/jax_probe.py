"""What JAX sees, printed as JSON: run as its own process, so that a crash inside a driver can be reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Any

FLOAT8_CAPABILITY = 8.9  # of the first GPUs that multiply FP8
QUANTISED = {  # as `models.tuning` names them
    "FP8": "w8a8_float8_e4m3fn",
    "FP8 in blocks of 128": "w8a8_float8_e4m3fn_g128",
    "INT8": "w8a8_int8",
    "4 bits in groups of 32": "w4a16_g32",
    "4 bits in groups of 64": "w4a16_g64",
    "4 bits in groups of 128": "w4a16_g128",
}


def main() -> None:
    """Print one JSON object; each part that fails holds the error instead."""
    parts: dict[str, Callable[[], Any]] = {
        "devices": _devices,
        "runtime": _runtime,
        "kernel backends": _kernel_backends,
        "quantised weights": _quantised_weights,
        "small sums over devices": _small_sums,
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


def _quantised_weights() -> dict[str, str]:
    import jax

    from lmdeploy_jax.engine.core.compile import tuning_dir
    from lmdeploy_jax.models import tuning

    device = jax.devices()[0]
    measured = {p.format for p in tuning.load(device.device_kind, tuning_dir()).products if p.tiling}
    capability = getattr(device, "compute_capability", None)
    return {
        name: products_of(kind, measured, device.platform, None if capability is None else float(capability))
        for name, kind in QUANTISED.items()
    }


def _small_sums() -> str:
    import jax

    from lmdeploy_jax.engine.core.compile import tuning_dir
    from lmdeploy_jax.models import tuning
    from lmdeploy_jax.parallel.peers import why_not_reached

    devices = jax.devices()
    if len(devices) == 1:
        return "none: there is one device"
    table = tuning.load(devices[0].device_kind, tuning_dir())
    return sums_of(table.all_reduce, devices[0].platform, why_not_reached(devices))


def sums_of(measured: str | None, platform: str, apart: str | None) -> str:
    """How a decode step adds up over devices, by the table's field and why devices reach no others."""
    if measured != "pallas" or platform == "cpu":
        return "XLA's: no kernel was measured to be faster on such devices"
    return f"XLA's: {apart}" if apart else "a kernel that stores into the other devices' memory"


def products_of(kind: str, measured: Container[str], platform: str, capability: float | None) -> str:
    """How products with weights of a format are done on a device.

    kind: the format as `models.tuning` names it; measured: those with a kernel that is faster than XLA.
    """
    if platform == "cpu":
        return "widened to float32 when loaded"
    kernels = "few rows by kernels, as measured; " if kind in measured else ""
    if "float8" in kind and capability is not None and capability < FLOAT8_CAPABILITY:
        return f"slow: FP8 needs compute capability {FLOAT8_CAPABILITY}, this GPU has {capability}"
    if kind.startswith("w8a8") and "_g" not in kind:
        return f"fast: {kernels}8 bits times 8 bits by XLA"
    if kernels:
        return f"fast: {kernels}other weights are widened before each product"
    return "slow: widened before each product; `bench tune MODEL --model-format ...` measures kernels"


if __name__ == "__main__":
    main()
