"""Converted checkpoints: the model's own weights in an Orbax checkpoint, config and tokenizer beside them.

    OUT/lmdeploy_jax.json    format version, shape and dtype of each weight, digest of config.json
    OUT/config.json, tokenizer files, chat template: copies
    OUT/weights/             Orbax: one uncompressed Zarr array a weight

The weights are files of the arrays' own bytes, so loading maps them: nothing is fused, cast or copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Container, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.converters.device import Placement, Progress, load_parallel, spec_sharding
from lmdeploy_jax.converters.headers import TensorInfo, are_sizes
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.converters.zarr import find_array, read_array
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.formats import WeightFormat

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import: done where it is used

FORMAT_VERSION = 1
MANIFEST = "lmdeploy_jax.json"
WEIGHTS = "weights"
COPIED = ("*.json", "*.model", "*.jinja", "*.txt")
NOT_COPIED = ("*.safetensors.index.json", MANIFEST)
SAVED_DTYPES = ("float32", "float16", "bfloat16", "float64", "uint16", "int16", "int32", "int8", "uint8",
                "float8_e4m3fn", "float8_e5m2")  # fmt: skip
CONVERT_AGAIN = "convert the original checkpoint again"


class ReadPart(NamedTuple):
    """How a weight that was `saved` in one shape is read in another: `read` is given what reads a slice of
    the saved one, and the slice that is wanted.
    """

    saved: jax.ShapeDtypeStruct
    read: Callable[[Callable[[Index], np.ndarray], Index], np.ndarray]


def save(
    out: str | os.PathLike[str],
    leaves: Mapping[str, jax.Array],
    meta: Mapping[str, Any],
    copy_from: str | os.PathLike[str],
    *,
    force: bool = False,
) -> pathlib.Path:
    """Writes `leaves` and copies of the small files of `copy_from` to `out`, all or nothing.

    `meta` is JSON data to keep in the manifest. Raises CheckpointError if `out` exists and is not an empty
    folder, unless `force` allows to replace it.
    """
    target, source = pathlib.Path(out).absolute(), pathlib.Path(copy_from).absolute()
    check_apart(target, source)
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there stays: it may be a link to another disk, or a volume's mount point.
    partial = (target if target.exists() else target.parent) / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        copy_small_files(source, partial)
        _save_weights(partial / WEIGHTS, leaves)
        (partial / MANIFEST).write_text(json.dumps(_manifest(partial, leaves, meta), indent=1))
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def is_converted(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` was written by `save`."""
    return (pathlib.Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked manifest: `format_version`, `leaves` (name -> shape, dtype), `config_sha256`, `meta`."""
    path = pathlib.Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, leaves, digest = (manifest[k] for k in ("format_version", "leaves", "config_sha256"))
        sound = all(are_sizes(leaf["shape"]) and leaf["dtype"] in SAVED_DTYPES for leaf in leaves.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or missing ({error!r}); {CONVERT_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; {CONVERT_AGAIN}"
        )
    if not leaves or not sound:
        raise CheckpointError(f"{path}: lists no weights, or malformed ones; {CONVERT_AGAIN}")
    if digest != _digest(path.parent):
        raise CheckpointError(f"{path.parent}: config.json was changed after the conversion; {CONVERT_AGAIN}")
    return manifest


def read_formats(folder: str | os.PathLike[str]) -> dict[str, WeightFormat]:
    """How the weights are held that were quantised when they were saved, by name. Raises CheckpointError."""
    meta = read_manifest(folder).get("meta")
    described = meta.get("formats", {}) if isinstance(meta, Mapping) else {}
    try:
        return {name: WeightFormat(**fields) for name, fields in described.items()}
    except (AttributeError, TypeError) as error:
        path = pathlib.Path(folder) / MANIFEST
        raise CheckpointError(f"{path}: damaged formats ({error}); {CONVERT_AGAIN}") from error


def check_formats(
    folder: str | os.PathLike[str], formats: Mapping[str, WeightFormat], weights: Container[str]
) -> None:
    """Raises CheckpointError for a format that means nothing, or is that of none of the model's `weights`."""
    for name, held in formats.items():
        if name not in weights or not held.is_sound:
            path = pathlib.Path(folder) / MANIFEST
            raise CheckpointError(f"{path}: damaged format of {name}: {held}; {CONVERT_AGAIN}")


def load(
    folder: str | os.PathLike[str],
    specs: Mapping[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
    parts: Mapping[str, ReadPart] = MappingProxyType({}),
) -> dict[str, jax.Array]:
    """The weights named in `specs`, of their dtypes, straight to their shardings.

    parts: how a device's part is read of weights that are stored otherwise than `specs` has them, where the
    checkpoint `is_plain`. Raises CheckpointError where it is damaged or holds other weights than `specs` asks
    for.
    """
    root = pathlib.Path(folder).absolute()
    leaves = read_manifest(root)["leaves"]
    _check_leaves(root, leaves, {name: parts[name].saved if name in parts else specs[name] for name in specs})
    weights = root / WEIGHTS
    try:
        found = _plain(weights, leaves)
        if len(found) == len(leaves):
            placements = {n: _placement(found[n], spec, parts.get(n)) for n, spec in specs.items()}
            return load_parallel(placements, progress=progress)
        return _restore(weights, specs)
    except (CheckpointError, jax.errors.JaxRuntimeError):  # the latter: a device is out of memory
        raise
    except Exception as error:  # Orbax raises bare exceptions for what it finds in the files
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"{weights}: damaged ({reason}); {CONVERT_AGAIN}") from error


def is_plain(folder: str | os.PathLike[str]) -> bool:
    """Whether each weight is one file of its own bytes, of which any part can be read."""
    leaves = read_manifest(folder)["leaves"]
    return len(_plain(pathlib.Path(folder) / WEIGHTS, leaves)) == len(leaves)


def _plain(weights: pathlib.Path, leaves: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {n: info for n, leaf in leaves.items() if (info := _find(weights / n, leaf)) is not None}


def _find(folder: pathlib.Path, leaf: Mapping[str, Any]) -> TensorInfo | None:
    return find_array(folder, tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))


def _placement(info: TensorInfo, spec: jax.ShapeDtypeStruct, part: ReadPart | None) -> Placement:
    dtype = np.dtype(spec.dtype)

    def read(index: Index) -> np.ndarray:
        return read_array(info, index, dtype)

    fetch = read if part is None else partial(part.read, read)
    return Placement(spec.shape, dtype, spec_sharding(spec), fetch)


def _restore(weights: pathlib.Path, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """By Orbax itself, for weights that were sharded when they were saved: one chunk a shard."""
    import orbax.checkpoint as ocp

    args = {
        name: ocp.ArrayRestoreArgs(dtype=spec.dtype, sharding=spec_sharding(spec), global_shape=spec.shape)
        for name, spec in specs.items()
    }
    with ocp.Checkpointer(_handler(specs)) as checkpointer:
        request = ocp.args.PyTreeRestore(item=dict(specs), restore_args=args)
        return checkpointer.restore(weights, args=request)


def check_target(target: pathlib.Path, *, force: bool) -> None:
    """Raises CheckpointError where `save` could not write to `target`, whatever it is to write."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: a file; name a new folder to write to")
    if target.is_dir() and any(target.iterdir()):
        _check_replaceable(target, force=force)
    path = target.absolute()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"{target}: {above} is no folder that you may write to; name another one")


def _check_replaceable(target: pathlib.Path, *, force: bool) -> None:
    owned = pathlib.Path.cwd(), pathlib.Path(os.path.expanduser("~"))
    own = next((folder for folder in owned if _holds(target, folder)), None)
    if own is not None:
        raise CheckpointError(f"{target}: would replace {own} and all that is in it; name a new folder")
    if not force:
        raise CheckpointError(
            f"{target}: is not empty; name a new folder, or force its replacement (--force)"
        )


def check_apart(target: pathlib.Path, source: pathlib.Path) -> None:
    """Raises CheckpointError where replacing `target` would remove the checkpoint `source`."""
    if _holds(target, source):
        raise CheckpointError(f"{target}: holds the checkpoint that is read; name another folder to write to")


def _holds(target: pathlib.Path, folder: pathlib.Path) -> bool:
    return folder.resolve().is_relative_to(target.resolve())


def copy_small_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Config, tokenizer and chat template of a checkpoint folder; never its weights, and never code."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not any(file.match(skipped) for skipped in NOT_COPIED):
                shutil.copyfile(file, target / file.name)


def _save_weights(folder: pathlib.Path, leaves: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(_handler(leaves)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(dict(leaves)))


def _handler(leaves: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> ocp.PyTreeCheckpointHandler:
    """Plain files without compression, read at disk speed; a few gigabytes (or one weight) in flight."""
    import orbax.checkpoint as ocp

    largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        restore_concurrent_gb=2 + 2 * largest // 10**9,
    )


def _manifest(
    folder: pathlib.Path, leaves: Mapping[str, jax.Array], meta: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config_sha256": _digest(folder),
        "meta": dict(meta),
        "leaves": {
            name: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
            for name, leaf in leaves.items()
        },
    }


def _digest(folder: pathlib.Path) -> str:
    config = folder / "config.json"
    try:
        return hashlib.sha256(config.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{config}: cannot be read: {error.strerror}") from error


def _replace(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Puts the finished folder in its place; what was there goes only then."""
    if not target.exists():
        partial.rename(target)
        return
    clear(target, keep=partial)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == MANIFEST):  # last: now it is one
        entry.rename(target / entry.name)


def clear(folder: pathlib.Path, keep: pathlib.Path | None = None) -> None:
    """Removes what is in `folder`, but for `keep`, and not the folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and entry != keep:
            shutil.rmtree(entry)
        elif entry != keep:
            entry.unlink()


def _check_leaves(
    root: pathlib.Path, stored: Mapping[str, Any], specs: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    problems = [f"missing weight {name}" for name in specs.keys() - stored.keys()]
    problems += [f"extra weight {name}" for name in stored.keys() - specs.keys()]
    for name in specs.keys() & stored.keys():
        if tuple(stored[name]["shape"]) != specs[name].shape:
            problems.append(f"{name}: stored as {stored[name]['shape']}, wanted {list(specs[name].shape)}")
    if problems:
        raise CheckpointError(f"{root}: {'; '.join(sorted(problems)[:20])}; {CONVERT_AGAIN}")
