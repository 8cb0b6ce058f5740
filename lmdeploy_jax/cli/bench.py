"""`bench throughput|latency|kernels|tune MODEL` and `bench serve URL`: fixed work, one JSON line a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.bench.workloads import MAX_LEN, WORKLOADS, Job, make
from lmdeploy_jax.cli.engine_flags import add_engine_flags, engine_config
from lmdeploy_jax.cli.flags import FlagSet, UsageError

if TYPE_CHECKING:
    from lmdeploy_jax.bench.session import Session
    from lmdeploy_jax.models.config import DecoderConfig

DEFAULT_WORKLOADS = {"throughput": "b1,b32,b128,mix256", "latency": "b1", "serve": "mix256"}
MODES = (*DEFAULT_WORKLOADS, "kernels", "tune")
USAGE = "bench throughput|latency|kernels|tune MODEL [FLAGS], or bench serve URL [FLAGS]"
ABOUT = f"""MODEL is a checkpoint folder, a hub id, or one of these shapes, for which a checkpoint of random
weights is made: {", ".join(shapes.names())}.

Every run is greedy and ignores stop ids; the prefix cache is off unless asked for. A first, unreported run
warms up. Figures go to standard output as JSON lines, everything else to standard error.

throughput  all requests of a workload at once: tokens a second, time a step, share of the bandwidth limit
latency     the requests one after another: time to the first token and between tokens, with percentiles
serve       the requests over HTTP to the server at URL (any that speaks OpenAI's protocol), at once, at
            --request_rate, or at most --concurrency at a time; flags of the engine have no meaning then
kernels     the attention kernels alone, by MODEL's heads: time and share of the GPU's limit
tune        measures which way of multiplying few rows is fastest for MODEL's matrices on this GPU, and keeps
            the answers in --tuning_dir, where the engine looks for them at its start"""


def define(flags: FlagSet) -> None:
    """The flags of the command."""
    section = "Work"
    add, text, number = flags.add, absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    about = (
        f"comma-separated list of {', '.join(WORKLOADS)}; without it b1,b32,b128,mix256, or b1 for latency"
    )
    add(section, text, "workloads", None, about)
    add(section, number, "reps", 2, "repetitions of each workload", lower_bound=1)
    add(section, number, "seed", 0, "seed of the prompts")
    add(
        section,
        absl_flags.DEFINE_float,
        "bandwidth",
        None,
        "memory bandwidth in GB/s; without it measured once",
    )
    add(
        section,
        text,
        "checkpoint_dir",
        None,
        "where random checkpoints are kept; without it the cache folder",
    )
    add(section, text, "out", None, "file to which the JSON lines are appended too")
    add(section, text, "tuning_dir", None, "folder of bench tune's table; without it the cache folder")
    _define_serve(flags)
    add_engine_flags(flags, {"enable_prefix_caching": False, "session_len": MAX_LEN})


def _define_serve(flags: FlagSet) -> None:
    section = "Work of bench serve"
    rate = "requests a second, arriving at random (Poisson); without it all at once"
    flags.add(section, absl_flags.DEFINE_float, "request_rate", None, rate, lower_bound=1e-3)
    most = "most requests at a time; without it no limit"
    flags.add(section, absl_flags.DEFINE_integer, "concurrency", None, most, lower_bound=1)
    name = "the model's name there; without it the first that the server lists"
    flags.add(section, absl_flags.DEFINE_string, "model_name", None, name)
    flags.add(section, absl_flags.DEFINE_string, "api_key", None, "key that the server asks for")


def run(flags: FlagSet, args: list[str]) -> int:
    """Run the workloads and print the figures."""
    mode, model = _positional(args)
    if mode in ("kernels", "tune"):
        return (_kernels if mode == "kernels" else _tune)(flags, model)
    names = _workloads(flags["workloads"] or DEFAULT_WORKLOADS[mode])
    if mode == "serve":
        return _serve(flags, model.rstrip("/").removesuffix("/v1"), names)
    config = engine_config(flags)
    folder = _checkpoint(model, flags["checkpoint_dir"])

    from lmdeploy_jax.bench.session import Session  # JAX is imported here

    bandwidth, how = _bandwidth(flags["bandwidth"], config.tp)
    _say(f"starting the engine on {folder}")
    session = Session(folder, config, bandwidth)
    common = {"engine": "lmdeploy_jax", "model": model, "mode": mode, **_device()}
    common |= {"bandwidth_gb_s": round(bandwidth / 1e9, 1), "bandwidth_is": how, **session.startup}
    try:
        for name in names:
            for line in _measure(session, mode, make(name, flags["seed"]), flags["reps"]):
                _write(common | {"workload": name} | line, flags["out"])
    finally:
        session.engine.close()
    return 0


def _kernels(flags: FlagSet, model: str) -> int:
    from lmdeploy_jax.bench import kernels

    config = _decoder_config(model)
    bandwidth, _ = _bandwidth(flags["bandwidth"], 1)
    for result in kernels.measure(config, bandwidth):
        _write({"mode": "kernels", "model": model, **_device(), **asdict(result)}, flags["out"])
    return 0


def _tune(flags: FlagSet, model: str) -> int:
    import jax

    from lmdeploy_jax.bench.tune import products, tune
    from lmdeploy_jax.engine.compile import tuning_dir
    from lmdeploy_jax.models import tuning

    folder = Path(flags["tuning_dir"]) if flags["tuning_dir"] else tuning_dir()
    path = folder / tuning.file_name(jax.devices()[0].device_kind)
    table = tuning.read(path) if path.exists() else tuning.UNTUNED
    for name, shape in products(_decoder_config(model)).items():
        found = tune(shape, table)
        table = table.merged(tuning.Tuning(tuple(found)))
        for product in found:
            _write({"mode": "tune", "model": model, "product": name, **asdict(product)}, flags["out"])
    tuning.write(path, table)
    _say(f"kept in {path}")
    return 0


def _decoder_config(model: str) -> DecoderConfig:
    """Of a shape, a checkpoint folder or a hub id; only the config is read."""
    from lmdeploy_jax.converters.config import read_config
    from lmdeploy_jax.converters.families import build_config
    from lmdeploy_jax.converters.hub import resolve_model

    if model in shapes.names() and not Path(model).is_dir():
        return build_config(shapes.read(model), model)
    return read_config(resolve_model(model))


def _serve(flags: FlagSet, url: str, names: list[str]) -> int:
    from lmdeploy_jax.bench import load

    model = flags["model_name"] or load.model_name(url, flags["api_key"])
    target = load.Target(url, model, flags["api_key"])
    rate, concurrency = flags["request_rate"], flags["concurrency"]
    arrivals = load.Arrivals(rate, concurrency, flags["seed"])
    common = {"mode": "serve", "url": url, "model": model, "request_rate": rate, "concurrency": concurrency}
    for name in names:
        jobs = make(name, flags["seed"])
        load.run(target, jobs, arrivals)  # warm-up
        for rep in range(flags["reps"]):
            wall, answers = load.run(target, jobs, arrivals)
            _write(common | {"workload": name, "rep": rep} | load.summary(jobs, wall, answers), flags["out"])
            if bad := [a.error for a in answers if a.error]:
                _say(f"{len(bad)} of {len(jobs)} requests failed; the first: {bad[0]}")
    return 0


def _measure(session: Session, mode: str, jobs: list[Job], reps: int) -> Iterator[dict[str, Any]]:
    once = session.throughput if mode == "throughput" else session.latency
    once(jobs)  # warm-up
    for rep in range(reps):
        yield {"rep": rep, **once(jobs)}


def _positional(args: list[str]) -> tuple[str, str]:
    if len(args) != 2 or args[0] not in MODES:
        raise UsageError(
            f"usage: lmdeploy_jax {USAGE}; MODEL may be one of the shapes {', '.join(shapes.names())}"
        )
    return args[0], args[1]


def _workloads(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not names:
        raise UsageError(f"--workloads={text}: choose from {', '.join(WORKLOADS)}")
    return names


def _checkpoint(model: str, root: str | None) -> str:
    """A random checkpoint where MODEL names a shape, else MODEL itself."""
    if model not in shapes.names() or Path(model).is_dir():
        return model
    from lmdeploy_jax.engine.compile import default_cache_dir

    folder = Path(root) if root else default_cache_dir().parent / "bench"
    _say(f"random checkpoint of shape {model} in {folder}")
    return str(checkpoint.make(model, folder))


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
