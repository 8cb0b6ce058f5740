"""`bench throughput|latency|kernels|tune MODEL` and `bench serve URL`: fixed work, one JSON line a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from lmdeploy_jax.bench import checkpoint, quantised, shapes
from lmdeploy_jax.bench.workloads import HIGHEST_ID, MAX_LEN, WORKLOADS, Job, make
from lmdeploy_jax.cli.engine_flags import add_engine_flags, engine_config
from lmdeploy_jax.cli.flags import PROGRAM, FlagSet, UsageError
from lmdeploy_jax.hub import resolve_model

if TYPE_CHECKING:
    from lmdeploy_jax.bench.session import Session
    from lmdeploy_jax.models.config import DecoderConfig

DEFAULT_WORKLOADS = {"throughput": "b1,b32,b128,mix256", "latency": "b1", "serve": "mix256"}
SECTION = "Work"
USAGE = "bench throughput|latency|kernels|tune MODEL [FLAGS], or bench serve URL [FLAGS]"
MODEL = f"""MODEL is a checkpoint folder, a hub id, or one of these shapes, for which a checkpoint of random
weights is made, quantised as --model-format says: {", ".join(shapes.names())}."""
RUNS = """Every run is greedy and ignores stop ids. A first, unreported run warms up. Figures go to standard
output as JSON lines, everything else to standard error."""
ABOUT = f"""throughput  all requests of a workload at once: tokens a second, share of the bandwidth limit
latency     the requests one after another: time to the first token and between tokens, with percentiles
serve       the requests over HTTP to a running server, any that speaks OpenAI's protocol
kernels     the attention kernels alone, by MODEL's heads: time and share of the GPU's limit
tune        measures which way of multiplying few rows is fastest for MODEL's matrices on this GPU

{PROGRAM} bench SUBCOMMAND --help lists the flags of each; these are common to the first three."""


@dataclass(frozen=True)
class Subcommand:
    """A command of its own behind `bench`, as `cli.main` takes it."""

    USAGE: str
    ABOUT: str
    define: Callable[[FlagSet], None]
    run: Callable[[FlagSet, list[str]], int]


def define(flags: FlagSet) -> None:
    """What every run of workloads can be told."""
    flags.known_only = True
    _define_runs(flags)


def _define_runs(flags: FlagSet) -> None:
    number = absl_flags.DEFINE_integer
    about = (
        f"comma-separated list of {', '.join(WORKLOADS)}; without it b1,b32,b128,mix256 for throughput, b1 "
        "for latency, mix256 for serve"
    )
    flags.add(SECTION, absl_flags.DEFINE_string, "workloads", None, about)
    flags.add(SECTION, number, "reps", 2, "repetitions of each workload", lower_bound=1)
    flags.add(SECTION, number, "seed", 0, "seed of the prompts")
    _define_out(flags)


def run(flags: FlagSet, args: list[str]) -> int:
    """Which of the subcommands is wanted must be said."""
    known = ", ".join(SUBCOMMANDS)
    raise UsageError(f"usage: {PROGRAM} {USAGE}; bench does one of {known}, but was given {args}.")


def _define_out(flags: FlagSet) -> None:
    text = "file to which the JSON lines are appended too"
    flags.add(SECTION, absl_flags.DEFINE_string, "out", None, text)


def _define_bandwidth(flags: FlagSet) -> None:
    text = "memory bandwidth in GB/s; without it measured once"
    flags.add(SECTION, absl_flags.DEFINE_float, "bandwidth", None, text)


def _define_engine(flags: FlagSet) -> None:
    _define_runs(flags)
    _define_bandwidth(flags)
    text = (
        "where random checkpoints are kept; without it the cache folder. One in memory, such as /dev/shm, is "
        "written faster than a disk"
    )
    flags.add(SECTION, absl_flags.DEFINE_string, "checkpoint_dir", None, text)
    _define_block_scales(flags)
    text = "make a random checkpoint's weights on the devices, as the engine starts, instead of writing files"
    flags.add(SECTION, absl_flags.DEFINE_boolean, "random", False, text)
    add_engine_flags(flags, {"enable_prefix_caching": False, "session_len": MAX_LEN})


def _define_block_scales(flags: FlagSet) -> None:
    text = "of fp8 weights: a scale for each block of 128x128, as in DeepSeek's, rather than one for a matrix"
    flags.add(SECTION, absl_flags.DEFINE_boolean, "block_scales", False, text)


def _define_serve(flags: FlagSet) -> None:
    _define_runs(flags)
    section = "Load"
    rate = "requests a second, arriving at random (Poisson); without it all at once"
    flags.add(section, absl_flags.DEFINE_float, "request_rate", None, rate, lower_bound=1e-3)
    most = "most requests at a time; without it no limit"
    flags.add(section, absl_flags.DEFINE_integer, "concurrency", None, most, lower_bound=1)
    name = "the model's name there; without it the first that the server lists"
    flags.add(section, absl_flags.DEFINE_string, "model_name", None, name)
    flags.add(section, absl_flags.DEFINE_string, "api_key", None, "key that the server asks for")


def _define_kernels(flags: FlagSet) -> None:
    _define_bandwidth(flags)
    _define_out(flags)


def _define_tune(flags: FlagSet) -> None:
    share = "devices that the engine will use: the products are those of one of them; one GPU measures them"
    flags.add(SECTION, absl_flags.DEFINE_integer, "tp", 1, share, lower_bound=1)
    formats = f"format of the weights but a head's: {', '.join(quantised.FORMATS)}; without it 16 bits"
    flags.add(SECTION, absl_flags.DEFINE_string, "model_format", None, formats)
    _define_block_scales(flags)
    text = "folder of the table, where the engine looks for it; without it the cache folder"
    flags.add(SECTION, absl_flags.DEFINE_string, "tuning_dir", None, text)
    _define_out(flags)


def _engine(mode: str, flags: FlagSet, args: list[str]) -> int:
    """Throughput or latency of an engine in this process."""
    model = _target(mode, args)
    names = _workloads(flags["workloads"] or DEFAULT_WORKLOADS[mode])
    config = engine_config(flags)
    folder = _checkpoint(model, flags)
    if folder != model:  # it says itself how it is quantised
        config = replace(config, model_format=None)

    from lmdeploy_jax.bench.session import Session  # JAX is imported here

    bandwidth, how = _bandwidth(flags["bandwidth"], config.tp)
    _say(f"starting the engine on {folder}")
    session = Session(folder, config, bandwidth)
    vocabulary = session.engine.vocab_size
    common = {"engine": PROGRAM, "model": model, "mode": mode, **_device(), **_folded(vocabulary)}
    common |= {"bandwidth_gb_s": round(bandwidth / 1e9, 1), "bandwidth_is": how, **session.startup}
    try:
        for name in names:
            for line in _measure(session, mode, make(name, flags["seed"], vocabulary), flags["reps"]):
                _write(common | {"workload": name} | line, flags["out"])
    finally:
        session.engine.close()
    return 0


def _folded(vocabulary: int) -> dict[str, int]:
    """Told where the work's ids differ from those of other models."""
    return {"ids_below": vocabulary} if vocabulary < HIGHEST_ID else {}


def _kernels(flags: FlagSet, args: list[str]) -> int:
    from lmdeploy_jax.bench import kernels

    model = _target("kernels", args)
    config = _decoder_config(model)
    bandwidth, _ = _bandwidth(flags["bandwidth"], 1)
    for result in kernels.measure(config, bandwidth):
        _write({"mode": "kernels", "model": model, **_device(), **asdict(result)}, flags["out"])
    return 0


def _tune(flags: FlagSet, args: list[str]) -> int:
    model = _target("tune", args)
    import jax

    from lmdeploy_jax.bench import quant_tune
    from lmdeploy_jax.bench.tune import products, tune
    from lmdeploy_jax.engine.core.compile import tuning_dir
    from lmdeploy_jax.models import tuning

    folder = Path(flags["tuning_dir"]) if flags["tuning_dir"] else tuning_dir()
    kind = jax.devices()[0].device_kind
    path, peers = folder / tuning.file_name(kind), tuning.load(kind, folder).all_reduce == "pallas"
    table = tuning.read(path) if path.exists() else tuning.UNTUNED
    form = quantised.find(flags["model_format"], block_scales=flags["block_scales"])
    common = {"mode": "tune", "model": model, "tp": flags["tp"]}
    config = _decoder_config(model)
    if form is not None and (activations := form.held(config.hidden_size).activations):
        table = replace(table, rounding=quant_tune.rounding(config.hidden_size, activations))
    for name, shape in products(config, flags["tp"], peers=peers).items():
        if form is not None and name not in quant_tune.products_of(form.held(shape.inner)):
            continue
        found = tune(shape, table) if form is None else quant_tune.tune(shape, form.held(shape.inner), table)
        table = table.merged(tuning.Tuning(tuple(found)))
        for product in found:
            _write({**common, "product": name, **asdict(product)}, flags["out"])
    tuning.write(path, table)
    _say(f"kept in {path}")
    return 0


def _decoder_config(model: str) -> DecoderConfig:
    """Of a shape, a checkpoint folder or a hub id; only the config is read."""
    from lmdeploy_jax.converters.config import read_config
    from lmdeploy_jax.converters.families import build_config
    from lmdeploy_jax.hub import resolve_model

    if model in shapes.names() and not Path(model).is_dir():
        return build_config(shapes.read(model), model)
    return read_config(resolve_model(model))


def _serve(flags: FlagSet, args: list[str]) -> int:
    from lmdeploy_jax.bench import load
    from lmdeploy_jax.client import server_url

    url = server_url(_target("serve", args))
    names = _workloads(flags["workloads"] or DEFAULT_WORKLOADS["serve"])
    model = flags["model_name"] or load.model_name(url, flags["api_key"])
    target = load.Target(url, model, flags["api_key"])
    vocabulary = load.ids_below(target)
    rate, concurrency = flags["request_rate"], flags["concurrency"]
    arrivals = load.Arrivals(rate, concurrency, flags["seed"])
    common = {"mode": "serve", "url": url, "model": model, "request_rate": rate, "concurrency": concurrency}
    common |= _folded(vocabulary)
    failed = 0
    for name in names:
        jobs = make(name, flags["seed"], vocabulary)
        load.run(target, jobs, arrivals)  # warm-up
        for rep in range(flags["reps"]):
            wall, answers = load.run(target, jobs, arrivals)
            _write(common | {"workload": name, "rep": rep} | load.summary(jobs, wall, answers), flags["out"])
            if bad := [a.error for a in answers if a.error]:
                _say(f"{len(bad)} of {len(jobs)} requests failed; the first: {bad[0]}")
            failed += len(bad)
    return 1 if failed else 0


def _measure(session: Session, mode: str, jobs: list[Job], reps: int) -> Iterator[dict[str, Any]]:
    once = session.throughput if mode == "throughput" else session.latency
    once(jobs)  # warm-up
    for rep in range(reps):
        yield {"rep": rep, **once(jobs)}


def _target(mode: str, args: list[str]) -> str:
    """The one argument of a subcommand: a model, or a URL."""
    if len(args) != 1:
        raise UsageError(f"usage: {PROGRAM} {SUBCOMMANDS[mode].USAGE}; it was given {args}")
    return args[0]


def _workloads(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        raise UsageError(f"--workloads={text}: choose from {', '.join(WORKLOADS)}")
    return names


def _checkpoint(model: str, flags: FlagSet) -> str:
    """A random checkpoint where MODEL names a shape, else MODEL itself."""
    model_format, block_scales = flags["model_format"], flags["block_scales"]
    if model not in shapes.names() or Path(model).is_dir():
        if block_scales:
            raise UsageError(f"--block_scales is for random checkpoints, and {model} is none; leave it out")
        if flags["random"]:
            raise UsageError(f"--random is for shapes, and {model} is none; leave it out")
        resolve_model(model, revision=flags["revision"], download_dir=flags["download_dir"])
        return model
    from lmdeploy_jax.engine.core.compile import default_cache_dir

    root = flags["checkpoint_dir"]
    folder = Path(root) if root else default_cache_dir().parent / "bench"
    _say(f"random checkpoint of shape {model} in {folder}")
    if model_format == "hf":
        model_format = None
    make = checkpoint.make_unwritten if flags["random"] else checkpoint.make
    return str(make(model, folder, model_format=model_format, block_scales=block_scales))


def _bandwidth(given: float | None, devices: int) -> tuple[float, str]:
    from lmdeploy_jax.bench.bandwidth import measure

    if given is not None:
        return given * 1e9, "given"
    _say("measuring the memory bandwidth")
    return measure(devices), "measured"


def _device() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}


def _write(line: dict[str, Any], out: str | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


SUBCOMMANDS = {
    "throughput": Subcommand(
        "bench throughput MODEL [FLAGS]",
        "All requests of a workload at once: tokens a second, time a step, share of the bandwidth limit.\n\n"
        f"{MODEL}\n\n{RUNS} The prefix cache is off unless asked for.",
        _define_engine,
        partial(_engine, "throughput"),
    ),
    "latency": Subcommand(
        "bench latency MODEL [FLAGS]",
        "The requests one after another: time to the first token and between tokens, with percentiles.\n\n"
        f"{MODEL}\n\n{RUNS} The prefix cache is off unless asked for.",
        _define_engine,
        partial(_engine, "latency"),
    ),
    "serve": Subcommand(
        "bench serve URL [FLAGS]",
        "The requests over HTTP to the server at URL (any that speaks OpenAI's protocol), at once, at\n"
        f"--request-rate, or at most --concurrency at a time. Exit code 1 where requests failed.\n\n{RUNS}",
        _define_serve,
        _serve,
    ),
    "kernels": Subcommand(
        "bench kernels MODEL [FLAGS]",
        f"The attention kernels alone, by MODEL's heads: time and share of the GPU's limit.\n\n{MODEL}",
        _define_kernels,
        _kernels,
    ),
    "tune": Subcommand(
        "bench tune MODEL [FLAGS]",
        "Measures which way of multiplying few rows is fastest for MODEL's matrices on this GPU, and keeps\n"
        f"the answers in --tuning-dir, where the engine looks for them at its start.\n\n{MODEL}",
        _define_tune,
        _tune,
    ),
}
