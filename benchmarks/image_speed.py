"""How fast images are on an H200: python -m benchmarks.image_speed internvl2-8b --checkpoint_dir /dev/shm

Prints a line a figure, beside what is wanted. Each of `--pieces` is by itself: `tower` (the vision model with
random weights, by numbers of tiles), `accuracy` (its numbers beside float32), `packed` (attention in one long
row of patches), `cuts` (attention of views by blocks, warps and stages), and of one engine with random
weights `first` (the first token of an image beside its parts measured alone), `requests` (many at once) and
`arrivals` (images while texts stream).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.steady_arrivals import measure
from benchmarks.step_profile import report
from lmdeploy_jax import JaxEngineConfig
from lmdeploy_jax.bench import checkpoint, shapes
from lmdeploy_jax.bench.gpu_trace import traced
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.engine.core.buckets import TILES
from lmdeploy_jax.engine.core.compile import CompileCounter, use_cache
from lmdeploy_jax.engine.core.encoder import compiler_options
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.request import Request, SamplingParams, StepOutput
from lmdeploy_jax.pallas_kernels.encoder_attention import encoder_attention, pallas
from lmdeploy_jax.pallas_kernels.encoder_attention.pallas import Tuning
from lmdeploy_jax.prompt import EncodedPrompt, Span, SpanImage
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.families import vision_family
from lmdeploy_jax.vision.model import VisionModel
from lmdeploy_jax.vision.packing import output_of, pack
from lmdeploy_jax.vision.processor import View

ON_GPU = jax.default_backend() == "gpu"
BACKEND, DTYPE = ("pallas", "bfloat16") if ON_GPU else ("xla", "float32")
TOWER = "mosaic" if ON_GPU else "xla"  # its backend
ROWS, COLUMNS, VIEWS = 3, 4, 13  # tiles of a large image, and with the whole one
CALLS, TRIES = 20, 5
TEXT = 32  # tokens beside an image's
OUTPUT = 64  # tokens of each of many answers
ASKED = 64  # requests at once
RUNNING, EVERY, SECONDS = 32, 0.5, 4.0
CUTS = [Tuning(*cut) for cut in ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 4), (128, 64, 4, 2))]  # fmt: skip
Figures = Iterator[tuple[str, str, str]]  # what, how much, what is wanted


def seconds(call: Callable[[], Any], calls: int = CALLS) -> float:
    """Mean wall time of calls whose work waits on the device for each other, the first few left out."""
    for _ in range(3):
        jax.block_until_ready(call())
    begun = time.perf_counter()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - begun) / calls


def ms(value: float) -> str:
    return f"{1e3 * value:.3f} ms"


# -- the vision model alone -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vision:
    """A vision model with random weights, and its compiled runs by tiles."""

    config: VisionModelConfig
    runs: dict[int, Callable[[], Any]]

    def seconds(self, tiles: int) -> float:
        """Of as many runs as it takes."""
        most = max(self.runs)
        run = self.runs[min(tiles, most)]
        return seconds(lambda: [run() for _ in range(max(1, tiles // most))])


def vision_config(shape: str) -> VisionModelConfig:
    raw, none = Fields(shapes.read(shape), shape), Fields({}, shape)
    family = vision_family(shapes.read(shape))
    if family is None:
        raise SystemExit(f"{shape} takes no images; give a shape that does, internvl2-8b")
    return family.config(raw, none)


def vision_model(
    config: VisionModelConfig, sizes: Sequence[int], backend: str = TOWER, dtype: str = DTYPE
) -> Vision:
    """Of a fused tower, the sums of columns are those of the weights drawn."""
    model = nnx.eval_shape(lambda: VisionModel(config, dtype=jnp.dtype(dtype), backend=backend))
    graph, abstract = nnx.split(model)
    keys = iter(range(10**6))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """The same numbers for every dtype."""
        drawn = 0.02 * jax.random.normal(jax.random.key(next(keys)), leaf.shape)
        return drawn.astype("bfloat16").astype(leaf.dtype)

    state = jax.tree.map(draw, abstract)
    for layer in state["tower"]["layers"].values() if config.tower.fused else ():
        for each in (layer["attention"]["qkv"], layer["mlp"]["up"]):
            each["column_sums"][...] = each["weight"][...].astype("float32").sum(axis=-1).reshape(-1)
    run = jax.jit(lambda state, inputs: nnx.merge(graph, state)(inputs))

    def compiled(size: int) -> Callable[[], Any]:
        inputs = jax.device_put(pack(config, views(config, size), size, output_of(config, size)))
        return partial(run.lower(state, inputs).compile(compiler_options(config)), state, inputs)

    with ThreadPoolExecutor() as pool:
        return Vision(config, dict(zip(sizes, pool.map(compiled, sizes), strict=True)))


def views(config: VisionModelConfig, count: int, seed: int = 0) -> list[View]:
    side = config.tower.grid or 0
    shape = (count, side**2, int(np.prod(config.tower.patch_shape)))
    drawn = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return [View(each, (side, side)) for each in drawn]


def accuracy(config: VisionModelConfig, backend: str) -> Figures:
    """What the tower's numbers are off by."""
    got, want = (
        vision_model(config, [VIEWS], *how).runs[VIEWS]() for how in ((backend, DTYPE), ("xla", "float32"))
    )
    error = jnp.linalg.norm(got.astype("float32") - want) / jnp.linalg.norm(want)
    yield f"tower, {backend} {DTYPE}, relative error beside float32", f"{float(error):.1e}", ""


def tower(config: VisionModelConfig, backend: str, sizes: Sequence[int]) -> Figures:
    """Milliseconds a tile, and where they go."""
    vision = vision_model(config, sizes, backend)
    for tiles in (*vision.runs, 2 * VIEWS, 4 * VIEWS):
        wanted = {1: "<= 2 ms", VIEWS: "<= 1.3 ms", 2 * VIEWS: "<= 1.3 ms", 4 * VIEWS: "<= 1.3 ms"}
        yield f"tower, {tiles} tiles, a tile", ms(vision.seconds(tiles) / tiles), wanted.get(tiles, "")
    for tiles in sorted({VIEWS, 1} & vision.runs.keys(), reverse=True) if ON_GPU else ():
        with traced() as events:
            for _ in range(CALLS):
                out = vision.runs[tiles]()
            jax.block_until_ready(out)
        print(f"{tiles} tiles:", end=" ")
        report(events, vision.seconds(tiles), 14)


# -- attention alone --------------------------------------------------------------------------------------


def attention(shape: tuple[int, ...], segments: jax.Array | None, backend: str, cut: Tuning | None) -> Any:
    """A compiled call on drawn numbers; an exception where there can be none."""
    qkv = jax.random.normal(jax.random.key(0), shape, DTYPE)

    def call(qkv: jax.Array) -> jax.Array:
        if backend == "cudnn":
            return jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), implementation="cudnn")
        if cut is not None:
            return pallas.encoder_attention(qkv, segments, tuning=cut, interpret=not ON_GPU)
        return encoder_attention(qkv, segments, backend=backend)

    try:
        return jax.jit(call).lower(qkv).compile(), qkv
    except Exception as error:
        return error, qkv


def packed(config: VisionModelConfig, patches: int) -> Figures:
    """Attention of one view, and of four, in a row."""
    heads = config.tower.heads
    scores = f"scores alone would be {heads * patches**2 * 4 / 2**30:.1f} GiB"
    for size, parts in ((config.tower.head_dim, 1), (config.tower.head_dim, 4), (80, 1)):
        segments = jnp.repeat(jnp.arange(parts, dtype=jnp.int32), patches // parts)[None]
        for backend in dict.fromkeys((BACKEND, "xla")):
            call, qkv = attention((1, patches, 3, heads, size), segments, backend, None)
            if isinstance(call, Exception):
                yield f"{patches} patches, {backend}", f"{call!r:.200}", ""
                continue
            memory = call.memory_analysis().temp_size_in_bytes / 2**30
            took = f"{ms(seconds(partial(call, qkv), 5))}, {memory:.3f} GiB beside q, k, v and output"
            yield f"{patches} patches, {parts} views, heads of {size}, {backend}", took, scores


def cuts(config: VisionModelConfig) -> Figures:
    """Attention of the tiles of a large image, by candidates."""
    side, tower = config.tower.grid or 0, config.tower
    shape = (VIEWS, side**2 + 1, 3, tower.heads, tower.head_dim)
    wanted = [("pallas", cut) for cut in CUTS] + [("cudnn", None), ("xla", None)]
    with ThreadPoolExecutor() as pool:
        calls = list(pool.map(lambda each: attention(shape, None, *each), wanted))
    for (backend, cut), (call, qkv) in zip(wanted, calls, strict=True):
        failed = isinstance(call, Exception)
        took = f"{call!r:.200}" if failed else ms(seconds(partial(call, qkv)) / VIEWS)
        yield f"a layer's attention, a tile, {cut or backend}", took, "<= 0.011 ms"


# -- an engine --------------------------------------------------------------------------------------------


class Asked:
    """A request and when its tokens came."""

    def __init__(self, engine: Engine, prompt: EncodedPrompt, output: int, *, streams: bool = True) -> None:
        self.times: list[float] = []
        self.ended = False
        self.begun = time.perf_counter()
        engine.submit(Request(prompt, SamplingParams(max_new_tokens=output), self._note, streams=streams))

    def _note(self, out: StepOutput) -> None:
        self.times += [time.perf_counter()] * len(out.token_ids)
        if out.error is not None:
            raise SystemExit(repr(out.error))
        self.ended = out.finish_reason is not None

    def wait(self) -> float:
        """Seconds to the first token, when the last one has come."""
        while not self.ended:
            time.sleep(0.0005)
        return self.times[0] - self.begun


def prompt(config: VisionModelConfig, seed: int, count: int = VIEWS) -> EncodedPrompt:
    """An image of drawn patches between a few tokens of text."""
    rows = output_of(config, 1)
    patches = np.stack([view.patches for view in views(config, count, seed)])
    places = np.arange(count * rows, dtype=np.int32)
    side = config.tower.grid or 0
    image = SpanImage(patches, (side, side), places, places, rows)
    ids = text(seed, TEXT + len(places))
    return EncodedPrompt(ids, (Span(TEXT // 2, len(places), seed.to_bytes(8)),), images=(image,))


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(270, 500, length).tolist()


def first(engine: Engine, config: VisionModelConfig, alone: float) -> Figures:
    """The first token of an image of tiles and a thumbnail; `alone`: seconds of the tower for it."""
    size = config.processor.rule.plan(1, 1).height
    picture = Image.effect_noise((COLUMNS * size, ROWS * size), 64).convert("RGB")
    begun = time.perf_counter()
    config.processor(picture)
    yield "patches of an image, on the host", ms(time.perf_counter() - begun), ""
    tokens = len(prompt(config, 0))
    whole = [Asked(engine, prompt(config, seed), 1).wait() for seed in range(TRIES)]
    plain = [Asked(engine, EncodedPrompt(text(seed, tokens)), 1).wait() for seed in range(TRIES)]
    image, prefill = statistics.median(whole), statistics.median(plain)
    yield f"first token of an image of {VIEWS} tiles", ms(image), ""
    yield f"prefill of {tokens} tokens alone, tower alone", f"{ms(prefill)}, {ms(alone)}", ""
    yield "first token / (tower + prefill)", f"{image / (alone + prefill):.3f}", "<= 1.25"


def requests(engine: Engine, config: VisionModelConfig) -> Figures:
    """Many with an image each, at once."""
    for number, count in enumerate((VIEWS, 1)):
        prompts = [prompt(config, 1000 * (number + 1) + i, count) for i in range(ASKED)]
        begun = time.perf_counter()
        asked = [Asked(engine, each, OUTPUT, streams=False) for each in prompts]
        for each in asked:
            each.wait()
        took = time.perf_counter() - begun
        rates = f"{ASKED * OUTPUT / took:.0f} tokens/s, {ASKED / took:.1f} images/s"
        yield f"{ASKED} requests, an image of {count} tiles and {OUTPUT} tokens each", rates, "stated"


def arrivals(engine: Engine, config: VisionModelConfig) -> Figures:
    """Images while texts stream."""
    for seconds_, seed in ((1.0, 5000), (SECONDS, 6000)):
        prompts = [prompt(config, seed + i) for i in range(int(seconds_ / EVERY))]
        found = measure(engine, RUNNING, prompts, EVERY, seconds_)
    yield f"between tokens of {RUNNING} streams, quiet median", f"{found['quiet_ms']:.2f} ms", ""
    yield f"the same while an image comes every {EVERY} s, p99", f"{found['p99_ratio']:.2f} times", "<= 2.5"
    yield "largest gap", f"{found['max_ratio']:.2f} times", "<= 8"
    yield "first token of such an image", f"{found['first_ms']:.0f} ms", "stated"


# -- all of it --------------------------------------------------------------------------------------------


def show(figures: Figures) -> None:
    for what, value, wanted in figures:
        print(f"{what:<72} {value:<40} {wanted}", flush=True)


def serve(folder: Path, config: VisionModelConfig, pieces: Sequence[str]) -> None:
    """What of the pieces needs an engine."""
    alone = vision_model(config, [VIEWS]).seconds(VIEWS) if "first" in pieces else 0.0
    begun = time.perf_counter()
    engine = Engine(folder, JaxEngineConfig(session_len=8192, max_batch_size=ASKED), progress=False)
    counter = CompileCounter()
    try:
        print(f"the engine stands after {time.perf_counter() - begun:.1f} s", flush=True)
        made = {"first": partial(first, alone=alone), "requests": requests, "arrivals": arrivals}
        for name in [name for name in pieces if name in made]:
            show(made[name](engine, config))
    finally:
        engine.close()
    show(iter([("compilations while serving", str(counter.count), "0")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="internvl2-8b")
    parser.add_argument("--checkpoint_dir", default="/tmp/checkpoints")
    parser.add_argument("--pieces", default="tower,packed,cuts,first,requests,arrivals")
    parser.add_argument("--tower_backend", default=TOWER, help="of the tower alone")
    parser.add_argument(
        "--fused", action="store_true", help="norms and residuals of the tower alone in its products"
    )
    parser.add_argument(
        "--tiles", default=",".join(map(str, TILES["gpu" if ON_GPU else "cpu"])), help="of a run"
    )
    parser.add_argument("--patches", type=int, default=16384, help="of one long row")
    args = parser.parse_args()
    use_cache(None)
    config, pieces = vision_config(args.shape), args.pieces.split(",")
    config = replace(config, tower=replace(config.tower, fused=args.fused))
    alone = {
        "accuracy": partial(accuracy, backend=args.tower_backend),
        "tower": partial(
            tower, backend=args.tower_backend, sizes=[int(size) for size in args.tiles.split(",")]
        ),
        "packed": partial(packed, patches=args.patches),
        "cuts": cuts,
    }
    for name in [name for name in pieces if name in alone]:
        show(alone[name](config))
    if set(pieces) - alone.keys():
        serve(checkpoint.make(args.shape, Path(args.checkpoint_dir)), config, pieces)


if __name__ == "__main__":
    main()
