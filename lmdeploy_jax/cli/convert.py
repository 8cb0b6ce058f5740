"""`convert MODEL OUT`: a checkpoint in this project's own form, which every command accepts as MODEL."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

from absl import flags as absl_flags

from lmdeploy_jax.cli.engine_flags import HELP
from lmdeploy_jax.cli.flags import FlagSet, UsageError
from lmdeploy_jax.errors import CheckpointError

USAGE = "convert MODEL OUT [FLAGS]"
ABOUT = """Reads the Hugging Face checkpoint MODEL (a folder or a hub id) and writes an Orbax checkpoint into
the folder OUT, with config, tokenizer and chat template beside it. Every command takes OUT as MODEL.
Of a model that takes images the language model alone is written."""


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    add, text = flags.add, absl_flags.DEFINE_string
    choices = {"enum_values": ["auto", "float32", "float16", "bfloat16"]}
    about = "type in which the weights are written; auto keeps the checkpoint's"
    add("Conversion", absl_flags.DEFINE_enum, "dtype", "auto", about, **choices)
    add("Conversion", absl_flags.DEFINE_boolean, "force", False, "replace OUT where it is not empty")
    add("Conversion", text, "revision", None, HELP["revision"])
    add("Conversion", text, "download_dir", None, HELP["download_dir"])


def run(flags: FlagSet, args: list[str]) -> int:
    """Convert, and print sizes and times."""
    if len(args) != 2:
        raise UsageError(f"usage: lmdeploy_jax {USAGE}")
    model, out = args

    import jax
    from absl import logging as absl_logging

    absl_logging.set_verbosity(
        absl_logging.ERROR
    )  # Orbax warns of optional files that this checkpoint leaves out
    jax.config.update("jax_platforms", "cpu")  # the weights only pass through: no GPU need hold them

    from lmdeploy_jax.converters import orbax
    from lmdeploy_jax.converters.load import load_model, stored_dtype
    from lmdeploy_jax.engine.progress import loading_bar
    from lmdeploy_jax.hub import resolve_model

    _check_out(Path(out), flags["force"])
    start = time.perf_counter()
    folder = resolve_model(model, revision=flags["revision"], download_dir=flags["download_dir"])
    orbax.check_apart(Path(out), folder)
    _tell_of_images(folder, out)
    dtype = str(stored_dtype(folder)) if flags["dtype"] == "auto" else flags["dtype"]
    with loading_bar(True) as on_progress:
        loaded = load_model(folder, dtype=dtype, dequantise=False, on_progress=on_progress)
    read = time.perf_counter()
    leaves = dict(zip(loaded.skeleton.specs, loaded.leaves, strict=True))
    size = sum(leaf.nbytes for leaf in loaded.leaves)
    print(f"read {folder}: {len(leaves)} weights, {_gb(size)} in {dtype}, {read - start:.1f} s", flush=True)
    formats = {name: asdict(held) for name, held in loaded.skeleton.formats.items()}
    meta = {"dtype": dtype, "source": model, "formats": formats}
    orbax.save(out, leaves, meta, folder, force=flags["force"])
    print(f"wrote {out}: {_gb(_folder_bytes(Path(out)))} on disk, {time.perf_counter() - read:.1f} s")
    return 0


def _check_out(out: Path, force: bool) -> None:
    """Refuse before the download and the long read what the writer would refuse after them."""
    from lmdeploy_jax.converters import orbax

    try:
        orbax.check_target(out, force=force)
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def _tell_of_images(folder: Path, out: str) -> None:
    from lmdeploy_jax.converters.config import read_json
    from lmdeploy_jax.vision.families import vision_family

    if vision_family(read_json(folder, None)[0]) is not None:
        print(f"{folder}: what encodes images is left out; {out} will take text alone", file=sys.stderr)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
