"""Compiled programs on disk, found again without tracing them.

JAX's own compile cache knows a program by its lowered text, and tracing and lowering an engine's programs
takes longer than reading them. Here a program is known by what it is made from: the code, the model's
config, every shape, the device and the versions of the compilers.

The folder is as trusted as an installed package: whoever can write to it can run code as its reader.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import jax
from jax.experimental import serialize_executable

import lmdeploy_jax

log = logging.getLogger("lmdeploy_jax")
Key = tuple[str, int]
ROOT = Path(lmdeploy_jax.__file__).parent
CODE = ("models", "sampling", "engine", "parallel", "cache", "pallas_kernels", "converters", "vision")
COMPILERS = ("jax", "jaxlib", "flax", "numpy")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision")
UNFINISHED = "tmp"  # how the names of files begin that are being written
LONGEST_WRITE = 3600.0  # seconds
MOST_FOLDERS = 24  # one for each model, size of cache, version …


class ProgramCache:
    """The programs of one engine on its devices; `folder` None keeps nothing.

    `made_from`: whatever the programs depend on besides code, devices and versions, told by `repr`.
    """

    def __init__(self, folder: Path | None, devices: Sequence[jax.Device], *made_from: object) -> None:
        self._devices = list(devices)
        if self._devices[0].platform == "gpu":  # its programs may call Mosaic's runtime, found by the import
            from jax.experimental.pallas import mosaic_gpu  # noqa: F401
        self.fingerprint = _fingerprint(self._devices, made_from)
        """A name for all that a program depends on, on every node the same."""
        self._folder = None if folder is None else folder / f"{self.fingerprint}{_node()}"
        if self._folder is not None and self._folder.is_dir():
            with suppress(OSError):  # it may be another's, or read-only
                os.utime(self._folder)
            _sweep(self._folder)

    def holds(self, key: Key) -> bool:
        """Whether a program was kept, as far as its file's name tells."""
        return self._folder is not None and self._path(self._folder, key).is_file()

    def load(self, key: Key) -> jax.stages.Compiled | None:
        """The program, or None if it has to be compiled (damaged files count as missing)."""
        if self._folder is None or not self.holds(key):
            return None
        path = self._path(self._folder, key)
        try:
            payload, in_tree, out_tree = pickle.loads(path.read_bytes())
            client = self._devices[0].client
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, backend=client, execution_devices=self._devices
            )
        except Exception as error:  # whatever a damaged file brings about
            log.warning("compiled program %s cannot be read (%s); compiling it again", path, error)
            return None

    def store(self, key: Key, compiled: jax.stages.Compiled) -> None:
        """Keep a program. A disk that is full or read-only costs the next start, not this one."""
        if self._folder is None:
            return
        try:
            self._make_room(self._folder)
            _write(self._path(self._folder, key), serialize_executable.serialize(compiled))
        except OSError as error:
            log.warning(
                "compiled programs are not kept in %s (%s): the next start compiles them again; "
                "--compile-cache-dir names another folder", self._folder, error.strerror,
            )  # fmt: skip
            self._folder = None

    @staticmethod
    def _path(folder: Path, key: Key) -> Path:
        return folder / f"{key[0]}-{key[1]}"

    @staticmethod
    def _make_room(folder: Path) -> None:
        """Makes the folder, and drops those that were used longest ago when there are many. Other threads,
        and other engines, do so too.
        """
        if folder.is_dir():
            return
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        for old in sorted(folder.parent.iterdir(), key=_last_used)[:-MOST_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)


def _last_used(folder: Path) -> float:
    with suppress(OSError):  # somebody else has dropped it
        return folder.stat().st_mtime
    return 0.0


def _write(path: Path, content: object) -> None:
    """A whole file or none: others may read the folder, and a disk may be full."""
    with NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED, delete=False) as file:
        try:
            pickle.dump(content, file)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _sweep(folder: Path) -> None:
    """Drop what a process left that was killed while it wrote."""
    for path in folder.glob(UNFINISHED + "*"):
        with suppress(OSError):  # gone already: another process sweeps too, or has finished it
            if time.time() - path.stat().st_mtime > LONGEST_WRITE:
                path.unlink()


def _fingerprint(devices: Sequence[jax.Device], made_from: Sequence[object]) -> str:
    first = devices[0]
    facts = (
        made_from,
        [(device.id, device.device_kind) for device in devices],
        (first.platform, first.client.platform_version, _processor() if first.platform == "cpu" else ""),
        [version(package) for package in COMPILERS],
        [getattr(jax.config, setting) for setting in SETTINGS],
        os.environ.get("XLA_FLAGS"),
        _code_digest(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _node() -> str:
    """Nodes may share a folder, and each compiles for its own devices."""
    return f"-{jax.process_index()}" if jax.process_count() > 1 else ""


def _processor() -> str:
    """What the machine's code may use; folders in home directories meet several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _code_digest() -> str:
    digest = hashlib.sha256()
    for package in CODE:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
