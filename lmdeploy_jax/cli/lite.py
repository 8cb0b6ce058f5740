"""`lite auto_awq|auto_gptq|smooth_quant|fp8|calibrate MODEL --work-dir OUT`: quantises a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from lmdeploy_jax.cli.engine_flags import HELP
from lmdeploy_jax.cli.flags import PROGRAM, FlagSet, UsageError
from lmdeploy_jax.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy_jax.lite.methods import Method
    from lmdeploy_jax.lite.quantise import Calibration
    from lmdeploy_jax.lite.report import Error

USAGE = "lite fp8 MODEL --work-dir OUT [FLAGS]"
ABOUT = f"""fp8  weights of 8 bits, rounded to the nearest, and activations of 8 bits: loses least

MODEL is a checkpoint folder or a hub id, in 16 or 32 bits. OUT becomes a checkpoint that every command takes
as MODEL, and so do vLLM and transformers. A run that was interrupted goes on where it was when it
is repeated. {PROGRAM} lite SUBCOMMAND --help lists the flags of each."""
SECTION = "Quantisation"
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Subcommand:
    """A command of its own behind `lite`, as `cli.main` takes it."""

    name: str
    about: str
    methods: Callable[[FlagSet], Method]
    """What the flags choose."""
    own: Callable[[FlagSet], None] = lambda flags: None
    """Defines flags that others do not have."""
    calibrates: bool = True

    @property
    def USAGE(self) -> str:
        return f"lite {self.name} MODEL --work-dir OUT [FLAGS]"

    @property
    def ABOUT(self) -> str:
        return self.about

    def define(self, flags: FlagSet) -> None:
        """The flags of the command."""
        _define(flags)
        if self.calibrates:
            _define_calibration(flags)
        self.own(flags)

    def run(self, flags: FlagSet, args: list[str]) -> int:
        """Quantise, and print how far each kind of weights is from the original."""
        if len(args) != 1:
            raise UsageError(f"usage: {PROGRAM} {self.USAGE}; it was given {args}")
        return _quantise(args[0], flags, self.methods(flags), calibrates=self.calibrates)


def define(flags: FlagSet) -> None:
    """What every subcommand can be told."""
    _define(flags)


def run(flags: FlagSet, args: list[str]) -> int:
    """Which of the subcommands is wanted must be said."""
    known = ", ".join(SUBCOMMANDS)
    raise UsageError(f"usage: {PROGRAM} {USAGE}; lite does one of {known}, but was given {args}.")


def _define(flags: FlagSet) -> None:
    text, flag = absl_flags.DEFINE_string, partial(flags.add, SECTION)
    flag(text, "work_dir", "./work_dir", "folder that the quantised checkpoint is written to")
    flag(absl_flags.DEFINE_boolean, "force", False, "replace the folder where it is not empty")
    about = "type of the tensors that are not quantised; auto keeps the checkpoint's"
    flag(absl_flags.DEFINE_enum, "dtype", "auto", about, enum_values=["auto", "float16", "bfloat16"])
    about = "where it is computed; auto takes a GPU where there is one"
    flag(absl_flags.DEFINE_enum, "device", "auto", about, enum_values=list(DEVICES))
    flag(text, "revision", None, HELP["revision"])
    flag(text, "download_dir", None, HELP["download_dir"])
    flag(absl_flags.DEFINE_boolean, "trust_remote_code", False, HELP["trust_remote_code"])


def _define_calibration(flags: FlagSet) -> None:
    number, flag = absl_flags.DEFINE_integer, partial(flags.add, "Calibration")
    about = "file of text, or of JSON lines with `text` or `messages`; without it the package's own text"
    flag(absl_flags.DEFINE_string, "calib_data", None, about)
    about = (
        "the same file by LMDeploy's name; the names of its datasets are refused, since nothing is downloaded"
    )
    flag(absl_flags.DEFINE_string, "calib_dataset", None, about)
    about = "samples of text; 0 rounds to the nearest without looking at any"
    flag(number, "calib_samples", 128, about, lower_bound=0)
    flag(number, "calib_seqlen", 2048, "tokens of a sample", lower_bound=1)
    flag(number, "batch_size", 1, "samples at a time", lower_bound=1)


def _quantise(model: str, flags: FlagSet, method: Method, *, calibrates: bool) -> int:
    _choose_device(flags["device"])

    from lmdeploy_jax.hub import resolve_model
    from lmdeploy_jax.lite.quantise import Job
    from lmdeploy_jax.lite.report import table

    folder = resolve_model(model, revision=flags["revision"], download_dir=flags["download_dir"])
    calibration = _calibration(folder, flags) if calibrates else None
    dtype = None if flags["dtype"] == "auto" else _dtype(flags["dtype"])
    out = Path(flags["work_dir"])
    start = time.perf_counter()
    errors = Job(model, folder, out, method, calibration, dtype).run(force=flags["force"], on_layer=_tell)
    print(table(errors))
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")
    return 0


def _choose_device(device: str) -> None:
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "cuda" and jax.default_backend() != "gpu":
        raise ConfigError("--device cuda: JAX sees no GPU; see `lmdeploy_jax check_env`, or leave it out")


def _dtype(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)


def _calibration(folder: Path, flags: FlagSet) -> Calibration | None:
    samples, length = flags["calib_samples"], flags["calib_seqlen"]
    file = _file(flags)
    if not samples:
        return None

    from lmdeploy_jax.lite.quantise import Calibration
    from lmdeploy_jax.lite.texts import Texts

    texts = Texts(folder, trust_remote_code=flags["trust_remote_code"])
    if file is None:
        return Calibration(texts.built_in(samples, length), flags["batch_size"], "the package's own text")
    return Calibration(texts.of_file(file, samples, length), flags["batch_size"], f"drawn from {file.name}")


def _file(flags: FlagSet) -> Path | None:
    """The file of text that was asked for. Raises UsageError for a dataset's name."""
    named, dataset = flags["calib_data"], flags["calib_dataset"]
    if dataset is not None and not Path(dataset).is_file():
        raise UsageError(
            f"--calib-dataset {dataset}: no file of that name, and datasets are not downloaded; give a file "
            "of text with --calib-data, or leave both out for the package's own text"
        )
    if named is not None and dataset is not None:
        raise UsageError("--calib-data and --calib-dataset name the same thing; give one of them")
    return None if named is None and dataset is None else Path(named or dataset)


def _tell(done: int, layers: int, errors: Sequence[Error]) -> None:
    """One line a layer, on standard error."""
    outputs = [error.output for error in errors if error.output is not None]
    weights = [error.weight for error in errors]
    found = f", error of the outputs {100 * sum(outputs) / len(outputs):.3g} %" if outputs else ""
    found = found or (f", error of the weights {100 * sum(weights) / len(weights):.3g} %" if weights else "")
    print(f"layer {done} of {layers}{found}", file=sys.stderr, flush=True)


def _fp8(flags: FlagSet) -> Method:
    from lmdeploy_jax.lite.methods import Fp8

    return Fp8()


SUBCOMMANDS = {
    "fp8": Subcommand(
        "fp8",
        "Linear layers in FP8 (E4M3), a scale a row, and activations by token, as compressed-tensors.",
        _fp8,
        calibrates=False,
    ),
}
