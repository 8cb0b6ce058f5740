"""What `lite` costs tiny-chat: python -m benchmarks.quantised_accuracy [--only "awq 32,fp8"] [--count 50]

Writes tiny-chat in every format, and a copy of it with outliers (of what reads norms and `up`, the weights
of three channels are 50 times as large, and what they are given is 50 times as small), into a folder, and
prints a row of a Markdown table for each: perplexity of the answers to held-out prompts, how far the chances
of each token diverge from the original's, share of the prompts answered exactly, seconds of quantising.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.shared.tiny_chat_judge import Judge
from lmdeploy_jax import JaxEngineConfig, Pipeline
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.bench.accuracy import accuracy
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.calibrate import calibrate
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.gptq import Gptq
from lmdeploy_jax.lite.methods import Fp8, Method
from lmdeploy_jax.lite.quantise import Job
from lmdeploy_jax.lite.smooth_quant import SmoothQuant
from lmdeploy_jax.lite.texts import Texts

CHANNELS, FACTOR = 3, 50.0
READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
SAMPLES, LENGTH = 128, 512
HEAD = """| | perplexity | divergence, 1e-3 nats | exact answers | seconds |
|---|---|---|---|---|"""


def with_outliers(folder: Path) -> Path:
    """A copy of tiny-chat in `folder` that computes the same, through columns of very large weights: those
    that make most of what each norm and each `up` gives.
    """
    windows = Texts(TINY_CHAT).built_in(12, 128)
    told = load_file(calibrate("", TINY_CHAT, folder, Calibration(windows, 12, ""), lambda *_: None))
    tensors = load_file(TINY_CHAT / "model.safetensors")
    for name in [name for name in tensors if name.endswith("input_layernorm.weight")]:
        layer = name.removesuffix("input_layernorm.weight")
        for origin, readers in READERS.items():
            weights = {f"{layer}{reader}.weight" for reader in readers}
            wide = np.concatenate([tensors[weight].astype(np.float32) for weight in weights])
            size = told[f"{layer}{readers[0]}.absmean"] * np.linalg.norm(wide, axis=0)
            largest = np.argsort(-size)[:CHANNELS]
            _scale(tensors, f"{layer}{origin}.weight", (largest,), 1 / FACTOR)
            for weight in weights:
                _scale(tensors, weight, (slice(None), largest), FACTOR)
    shutil.copytree(TINY_CHAT, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _scale(tensors: dict[str, np.ndarray], name: str, place: tuple[Any, ...], factor: float) -> None:
    wide = tensors[name].astype(np.float32)
    wide[place] *= factor
    tensors[name] = wide


def methods() -> Iterator[tuple[str, Method, bool]]:
    """Name, method, whether it is calibrated."""
    for group in (128, 32):
        yield f"nearest {group}", Awq(group), False
        yield f"awq {group}", Awq(group), True
        yield f"nearest symmetric {group}", Gptq(group), False
        yield f"gptq {group}", Gptq(group), True
    yield "smooth_quant int8", SmoothQuant(), True
    yield "smooth_quant fp8", SmoothQuant("float8_e4m3fn"), True
    yield "fp8", Fp8(), False


def judged(name: str, folder: Path, seconds: float, judge: Judge, count: int) -> str:
    """A row of the table."""
    perplexity, apart = judge.judge(folder)
    with Pipeline(str(folder), JaxEngineConfig(dtype="float32", session_len=1024)) as pipe:
        shares = accuracy(pipe, count)
    exact = 100 * sum(shares.values()) / len(shares)
    return f"| {name} | {perplexity:.4f} | {1000 * apart:.2f} | {exact:.2f} % | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--count", type=int, default=50, help="prompts a task")
    options = parser.parse_args()
    judge = Judge(options.count)
    only = options.only.split(",") if options.only else []
    with tempfile.TemporaryDirectory() as root:
        outliers = with_outliers(Path(root, "outliers"))
        print(HEAD, flush=True)
        windows = Texts(TINY_CHAT).built_in(SAMPLES, LENGTH)
        for model, folder in (("", TINY_CHAT), ("outliers: ", outliers)):
            if not only or f"{model}original" in only:
                print(judged(f"{model}original", folder, 0, judge, options.count), flush=True)
            for name, method, calibrated in methods():
                if only and model + name not in only:
                    continue
                start, out = time.perf_counter(), Path(root, f"{model}{name}".replace(" ", "-"))
                calibration = Calibration(windows, 8, "its own tasks") if calibrated else None
                Job("tiny-chat", folder, out, method, calibration).run()
                taken = time.perf_counter() - start
                print(judged(model + name, out, taken, judge, options.count), flush=True)


if __name__ == "__main__":
    main()
