"""Looks at the machine and the installation, one thing at a time. Nothing here imports JAX."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from lmdeploy_jax import __version__

MISSING = "not found"
PROBE_SECONDS = 120
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml-dtypes",
    "tokenizers",
    "sentencepiece",
    "llguidance",
    "huggingface-hub",
    "jinja2",
    "absl-py",
    "psutil",
    "fastapi",
    "uvicorn",
)
LMDEPLOYS = "LMDEPLOY_"  # begins the names of LMDeploy's environment variables
GPU_QUERY = "index,name,driver_version,memory.total,memory.used,compute_cap"


def collect() -> dict[str, Any]:
    """Everything, by topic. A probe that fails leaves its error in place of its answer."""
    probes: dict[str, Callable[[], Any]] = {
        "lmdeploy_jax": lambda: __version__,
        "platform": _platform,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "processor": _processor,
        "packages": lambda: {name: package_version(name) for name in PACKAGES},
        "settings": _settings,
        "NVIDIA GPUs": _gpus,
        "GPU topology": _topology,
        "JAX": _jax,
    }
    return {name: _safely(probe) for name, probe in probes.items()}


def _safely(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def package_version(name: str) -> str:
    """The installed version of a distribution, or "not found"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def _platform() -> str:
    return f"{platform.platform()}, {platform.machine()}"


def _processor() -> str:
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / 2**30, memory.available / 2**30
    return f"{os.cpu_count()} cores, {total:.1f} GiB memory, {free:.1f} GiB free"


def _settings() -> dict[str, str]:
    """Environment variables that change how JAX, XLA and the hub's client work, and LMDeploy's own."""
    prefixes = ("XLA_", "JAX_", "CUDA_VISIBLE", "NCCL_", "TF_GPU", "LD_LIBRARY_PATH", "HF_HUB_OFFLINE")
    known = (*prefixes, LMDEPLOYS)
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(known)}


def _gpus() -> list[str]:
    """One line a GPU: index, name, driver, memory in all and in use, compute capability."""
    if shutil.which("nvidia-smi") is None:
        return []
    return _output(["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]).splitlines()


def _topology() -> str:
    if shutil.which("nvidia-smi") is None or len(_gpus()) < 2:
        return "one GPU or none"
    return _output(["nvidia-smi", "topo", "-m"])


def _jax() -> dict[str, Any] | str:
    """What JAX says in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lmdeploy_jax.cli.jax_probe"],
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
        check=False,
    )
    if done.returncode:
        return f"error: JAX ended with exit code {done.returncode}: {_messages(done.stderr)}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if _messages(done.stderr):  # such as a plugin that could not be loaded
        answer["messages"] = _messages(done.stderr)
    return answer


def _messages(stderr: str) -> list[str]:
    """What was said on standard error, without the lines of tracebacks."""
    frames = (" ", "^", "Traceback", "The above exception")
    return [line for line in stderr.splitlines() if line and not line.startswith(frames)][-10:]


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
