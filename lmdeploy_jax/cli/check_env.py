"""`check_env`: what is installed, which devices are seen, what works, and what to do about the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from lmdeploy_jax.cli import probes
from lmdeploy_jax.cli.flags import FlagSet, UsageError

USAGE = "check_env [--dump-file FILE]"
ABOUT = """Prints versions, settings, devices with their memory, and the kernel backends that work here. Each
part is looked at on its own: a broken installation is described, with the remedy where it is known. The exit
code is 1 where a problem was found."""
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
CUDA13_DRIVER = 580  # oldest driver for CUDA 13; CUDA 12 asks for 525


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    text = "also write the report to this file, as JSON (.json) or YAML (.yml, .yaml)"
    flags.add("Report", absl_flags.DEFINE_string, "dump_file", None, text)


def run(flags: FlagSet, args: list[str]) -> int:
    """Print the report; 1 where it names a problem."""
    if args:
        raise UsageError(f"check_env takes no argument, but was given {' '.join(args)!r}.")
    dump = _dumper(flags["dump_file"])
    report = probes.collect()
    report["problems"] = list(problems(report))
    print("\n".join(yaml_lines(report, quote=False)))
    if dump:
        Path(flags["dump_file"]).write_text(dump(report))
    return 1 if report["problems"] else 0


def problems(report: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the installation that `report` describes, each with its remedy."""
    packages, gpus, jax = report["packages"], report["NVIDIA GPUs"], report["JAX"]
    for name in ("jax", "jaxlib"):
        if packages[name] == probes.MISSING:
            yield f"{name} is not installed. Run: pip install lmdeploy_jax"
    yield from _mismatches(packages)
    if unread := [name for name in report["settings"] if name.startswith(probes.LMDEPLOYS)]:
        yield f"{', '.join(unread)}: LMDeploy's variables are not read here. Use flags (--help) instead"
    if isinstance(jax, str):
        yield f"JAX does not start. {jax}"
        return
    devices = jax["devices"]
    if isinstance(devices, str):
        yield f"JAX finds no device. {devices}"
    elif not any(device.startswith(("gpu", "cuda")) for device in devices):
        yield from _without_gpu(packages, gpus, jax.get("messages", []))


def _without_gpu(packages: dict[str, str], gpus: Any, messages: list[str]) -> Iterator[str]:
    """Why JAX sees no GPU, where it should see one."""
    plugins = [name for name in PLUGINS if packages[name] != probes.MISSING]
    found = len(gpus) if isinstance(gpus, list) else 0
    if found and not plugins:
        yield f"there are {found} NVIDIA GPUs, but JAX has no plugin. Run: pip install '{_extra(gpus)}'"
    elif found or (plugins and messages):
        said = "; ".join(messages) or "it gives no reason"
        yield f"{plugins[0]} is installed, but JAX sees no GPU ({found} are here): {said}"


def _mismatches(packages: dict[str, str]) -> Iterator[str]:
    jaxlib = packages["jaxlib"]
    for name in PLUGINS:
        if packages[name] not in (probes.MISSING, jaxlib):
            extra = f"lmdeploy_jax[{name.split('-')[1]}]"
            yield f"{name} {packages[name]} does not fit jaxlib {jaxlib}. Run: pip install -U '{extra}'"


def _extra(gpus: list[str]) -> str:
    """The extra that fits the driver, whose version is the third column."""
    match = re.match(r"[^,]*,[^,]*,\s*(\d+)", gpus[0])
    newer = match is not None and int(match[1]) >= CUDA13_DRIVER
    return "lmdeploy_jax[cuda13]" if newer else "lmdeploy_jax[cuda12]"


def _dumper(name: str | None) -> Any:
    if name is None:
        return None
    suffix = Path(name).suffix
    if suffix == ".json":
        return lambda report: json.dumps(report, indent=2) + "\n"
    if suffix in (".yml", ".yaml"):
        return lambda report: "\n".join(yaml_lines(report, quote=True)) + "\n"
    raise UsageError(f"--dump-file={name}: the name must end in .json, .yml or .yaml.")


def yaml_lines(value: Any, *, quote: bool, indent: int = 0) -> Iterator[str]:
    """Nested dicts and lists as YAML; without `quote`, strings stand as they are, for reading."""
    blank = " " * indent
    pairs = value.items() if isinstance(value, dict) else [(None, item) for item in value]
    for key, item in pairs:
        head = f"{blank}-" if key is None else f"{blank}{json.dumps(key) if quote else key}:"
        if isinstance(item, dict | list) and item:
            yield head
            yield from yaml_lines(item, quote=quote, indent=indent + 2)
        else:
            yield f"{head} {_scalar(item, quote, indent)}"


def _scalar(item: Any, quote: bool, indent: int) -> str:
    if quote:
        return json.dumps(item)
    if isinstance(item, dict | list):
        return "none"
    return str(item).replace("\n", "\n" + " " * (indent + 2))
