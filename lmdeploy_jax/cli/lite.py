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
    from lmdeploy_jax.lite.calibration import Calibration
    from lmdeploy_jax.lite.methods import Method
    from lmdeploy_jax.lite.report import Error

USAGE = "lite auto_awq|auto_gptq|smooth_quant|fp8|calibrate MODEL --work-dir OUT [FLAGS]"
ABOUT = f"""auto_awq      weights of 4 bits, channels scaled by what calibration finds (AWQ)
auto_gptq     weights of 4 bits, each column making good the errors of those before it (GPTQ)
smooth_quant  weights and activations of 8 bits, INT8 or FP8, outliers moved into the weights (SmoothQuant)
fp8           weights and activations of 8 bits, FP8, without calibration
calibrate     only what calibration finds of the inputs of linear layers

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
    work: Callable[[str, FlagSet], None]
    """What is done to a model."""
    sections: tuple[Callable[[FlagSet], None], ...] = ()
    """Define flags that not all others have."""

    @property
    def USAGE(self) -> str:
        return f"lite {self.name} MODEL --work-dir OUT [FLAGS]"

    @property
    def ABOUT(self) -> str:
        return self.about

    def define(self, flags: FlagSet) -> None:
        """The flags of the command."""
        _define(flags)
        for section in self.sections:
            section(flags)

    def run(self, flags: FlagSet, args: list[str]) -> int:
        """Do it, with lines on the standard error that tell how far it is."""
        if len(args) != 1:
            raise UsageError(f"usage: {PROGRAM} {self.USAGE}; it was given {args}")
        _choose_device(flags["device"])
        self.work(args[0], flags)
        return 0


def define(flags: FlagSet) -> None:
    """What every subcommand can be told."""
    flags.known_only = True
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


def _quantise(choose: Callable[[FlagSet], Method], model: str, flags: FlagSet) -> None:
    """Prints how far each kind of weights is from the original."""
    from lmdeploy_jax.hub import resolve_model
    from lmdeploy_jax.lite.quantise import Job
    from lmdeploy_jax.lite.report import table

    method = choose(flags)
    folder = resolve_model(model, revision=flags["revision"], download_dir=flags["download_dir"])
    calibration = _calibration(folder, flags) if method.calibrates else None
    dtype = None if flags["dtype"] == "auto" else _dtype(flags["dtype"])
    out = Path(flags["work_dir"])
    print(f"quantising {model}, {calibration or 'without calibration'}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    job = Job(model, folder, out, method, calibration, dtype)
    try:
        errors = job.run(force=flags["force"], on_layer=_tell)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr, flush=True)
        raise
    print(table(errors))
    print(f"wrote {out} in {time.perf_counter() - start:.1f} s")


def _calibrate(model: str, flags: FlagSet) -> None:
    """Statistics of the inputs of linear layers, in a file."""
    from lmdeploy_jax.hub import resolve_model
    from lmdeploy_jax.lite.calibrate import calibrate

    folder = resolve_model(model, revision=flags["revision"], download_dir=flags["download_dir"])
    calibration = _calibration(folder, flags)
    if calibration is None:
        raise UsageError("--calib-samples 0 leaves nothing to calibrate on; give at least 1")
    print(f"wrote {calibrate(model, folder, Path(flags['work_dir']), calibration, _tell)}")


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

    from lmdeploy_jax.lite.calibration import Calibration
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


def _tell(done: int, layers: int, errors: Sequence[Error] = ()) -> None:
    """One line a layer, on standard error."""
    outputs = [error.output for error in errors if error.output is not None]
    weights = [error.weight for error in errors]
    found = f", error of the outputs {100 * sum(outputs) / len(outputs):.3g} %" if outputs else ""
    found = found or (f", error of the weights {100 * sum(weights) / len(weights):.3g} %" if weights else "")
    print(f"layer {done} of {layers}{found}", file=sys.stderr, flush=True)


def _define_group(flags: FlagSet) -> None:
    number, flag = absl_flags.DEFINE_integer, partial(flags.add, SECTION)
    flag(number, "w_bits", 4, "bits of a weight: 4")
    flag(number, "w_group_size", 128, "columns that share a scale", lower_bound=8)


def _define_awq(flags: FlagSet) -> None:
    _define_group(flags)
    boolean, flag = absl_flags.DEFINE_boolean, partial(flags.add, SECTION)
    flag(boolean, "w_sym", False, "a grid that is as large below 0 as above, all zero points being 8")
    flag(boolean, "search_scale", True, "search the scales of channels, instead of by AWQ's ratio of a half")
    flag(boolean, "clip", True, "search how far each group's largest weights are clipped")


def _define_gptq(flags: FlagSet) -> None:
    _define_group(flags)
    about = "round the columns of the largest inputs first; the format stays the same"
    flags.add(SECTION, absl_flags.DEFINE_boolean, "act_order", False, about)


def _define_smooth_quant(flags: FlagSet) -> None:
    enum, flag = absl_flags.DEFINE_enum, partial(flags.add, SECTION)
    dtypes = ["int8", "fp8", "float8_e4m3fn", "float8_e5m2"]
    flag(enum, "quant_dtype", "int8", "type of weights and activations", enum_values=dtypes)
    about = "compressed-tensors, which vLLM and transformers read, or LMDeploy's own smooth_quant"
    layouts = ["compressed-tensors", "smooth_quant"]
    flag(enum, "layout", "compressed-tensors", about, enum_values=layouts)


def _awq(flags: FlagSet) -> Method:
    from lmdeploy_jax.lite.awq import Awq

    _check_bits(flags)
    return Awq(flags["w_group_size"], flags["w_sym"], flags["search_scale"], flags["clip"])


def _gptq(flags: FlagSet) -> Method:
    from lmdeploy_jax.lite.gptq import Gptq

    _check_bits(flags)
    return Gptq(flags["w_group_size"], act_order=flags["act_order"])


def _check_bits(flags: FlagSet) -> None:
    if flags["w_bits"] != 4:
        raise UsageError(f"--w-bits {flags['w_bits']} is not supported; take 4, or `lite fp8` for 8 bits")


def _smooth_quant(flags: FlagSet) -> Method:
    from lmdeploy_jax.lite.smooth_quant import COMPRESSED, DTYPES, SmoothQuant

    dtype, own = DTYPES[flags["quant_dtype"]], flags["layout"] == "smooth_quant"
    if not own and dtype not in COMPRESSED:
        raise UsageError(f"--quant-dtype {dtype} is no type of compressed-tensors; add --layout smooth_quant")
    return SmoothQuant(dtype, own)


def _fp8(flags: FlagSet) -> Method:
    from lmdeploy_jax.lite.methods import Fp8

    return Fp8()


SUBCOMMANDS = {
    "auto_awq": Subcommand(
        "auto_awq",
        "Linear layers in 4 bits by AWQ, in AutoAWQ's `gemm` version.",
        partial(_quantise, _awq),
        (_define_awq, _define_calibration),
    ),
    "auto_gptq": Subcommand(
        "auto_gptq",
        "Linear layers in 4 bits by GPTQ, symmetric, in AutoGPTQ's format.",
        partial(_quantise, _gptq),
        (_define_gptq, _define_calibration),
    ),
    "smooth_quant": Subcommand(
        "smooth_quant",
        "Linear layers and their inputs in 8 bits by SmoothQuant, a scale a row and a token.",
        partial(_quantise, _smooth_quant),
        (_define_smooth_quant, _define_calibration),
    ),
    "fp8": Subcommand(
        "fp8",
        "Linear layers in FP8 (E4M3), a scale a row, and activations by token, as compressed-tensors.",
        partial(_quantise, _fp8),
    ),
    "calibrate": Subcommand(
        "calibrate",
        "What linear layers are given, by channel, in inputs_stats.safetensors; nothing is quantised.",
        _calibrate,
        (_define_calibration,),
    ),
}
