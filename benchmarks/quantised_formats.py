"""tiny-chat in each format, rounded to the nearest: python -m benchmarks.quantised_formats [--count 50]

Prints a row of a Markdown table for each: share of held-out prompts answered exactly, what that is less than
in 16 bits, and how many answers are 16 bits' own. On a GPU `lmdeploy_jax bench tune tiny-chat --model-format
...` before it lets the hand-written kernels multiply; without, XLA does. A CPU widens weights as it loads
them, so that activations are not rounded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lmdeploy_jax import JaxEngineConfig, Pipeline
from lmdeploy_jax.assets import TINY_CHAT, tasks
from lmdeploy_jax.assets.tasks import Example, grade
from lmdeploy_jax.bench.accuracy import answers
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.gptq import Gptq
from lmdeploy_jax.lite.layouts import CompressedLayout, Tensors
from lmdeploy_jax.lite.methods import Fp8, Method
from lmdeploy_jax.lite.quantise import Job
from lmdeploy_jax.lite.rounding import Rounded
from lmdeploy_jax.lite.smooth_quant import SmoothQuant
from lmdeploy_jax.lite.weights import LayerWeights, Matrix

BLOCK = 128
MOST = 448.0  # of E4M3
PACKED = 8  # elements of 4 bits in a word


@dataclass(frozen=True)
class BlocksLayout:
    """DeepSeek's: a scale for each block of 128x128."""

    outputs: ClassVar[int] = BLOCK

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        return np.dtype(np.float32)

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        return {
            "weight": np.asarray(rounded.codes),
            "weight_scale_inv": np.ascontiguousarray(np.asarray(rounded.scales)[::BLOCK]),
        }

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        told = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        return told | {
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(plain_modules) or None,
        }


@dataclass(frozen=True)
class Blocks(Fp8):
    """Each block of 128x128 by its largest weight."""

    name = "fp8 blocks"
    group = BLOCK

    @property
    def layout(self) -> BlocksLayout:  # type: ignore[override]
        return BlocksLayout()

    def prepare(self, weights: LayerWeights) -> None:
        pass

    def round(self, matrix: Matrix, plain: np.dtype) -> Rounded:
        rows, columns = matrix.weight.shape
        blocks = matrix.weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = jnp.maximum(jnp.abs(blocks).max((1, 3)), 1e-7) / MOST
        codes = (blocks / scales[:, None, :, None]).reshape(rows, columns).astype(jnp.float8_e4m3fn)
        return Rounded(codes, jnp.repeat(scales, BLOCK, axis=0))

    nearest = round


@dataclass(frozen=True)
class PackedLayout:
    """compressed-tensors' 4-bit integers, symmetric."""

    group: int
    outputs: ClassVar[int] = 1

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        return np.dtype(np.float16)

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        codes = np.asarray(rounded.codes).astype(np.uint32)
        words = codes.reshape(len(codes), -1, PACKED) << np.arange(0, 32, 4, dtype=np.uint32)
        return {
            "weight_packed": words.sum(-1, dtype=np.uint32).view(np.int32),
            "weight_scale": np.asarray(rounded.scales).astype(np.float16),
            "weight_shape": np.array(codes.shape, np.int64),
        }

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
        weights |= {"group_size": self.group}
        told = CompressedLayout("int").settings(plain_modules)
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {**told, "format": "pack-quantized", "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Packed(Gptq):
    """As GPTQ without calibration, in compressed-tensors' layout."""

    @property
    def layout(self) -> PackedLayout:  # type: ignore[override]
        return PackedLayout(self.group)


METHODS: Mapping[str, Method] = {
    "awq, groups of 128": Awq(128),
    "gptq, groups of 128": Gptq(128),
    "compressed-tensors, 4 bits, groups of 128": Packed(128),
    "awq, groups of 32": Awq(32),
    "compressed-tensors, INT8": SmoothQuant(),
    "compressed-tensors, FP8": Fp8(),
    "fp8, blocks of 128x128": Blocks(),
    "smooth_quant, INT8": SmoothQuant("int8", own_layout=True),
    "smooth_quant, FP8": SmoothQuant("float8_e4m3fn", own_layout=True),
}


def written(name: str, folder: Path) -> Path:
    """tiny-chat in the format `name`."""
    Job("tiny-chat", TINY_CHAT, folder, METHODS[name]).run()
    return folder


def answered(folder: Path, examples: Sequence[Example], dtype: str) -> list[str]:
    config = JaxEngineConfig(dtype=dtype, session_len=1024, max_batch_size=64, eager_mode=True)  # type: ignore[arg-type]
    with Pipeline(str(folder), config, progress=False) as pipe:
        return answers(pipe, examples)


def rows(names: Sequence[str], count: int, dtype: str) -> Iterator[str]:
    """Of the table."""
    examples = [example for task in tasks.TASKS for example in tasks.held_out(task, count, 1)]
    plain = answered(TINY_CHAT, examples, dtype)
    exact = np.mean([grade(example, text) for example, text in zip(examples, plain, strict=True)])
    yield f"| 16 bits | {100 * exact:.2f} % | | |"
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            texts = answered(written(name, Path(root, name.replace(" ", "-"))), examples, dtype)
            right = np.mean([grade(example, text) for example, text in zip(examples, texts, strict=True)])
            same = np.mean([ours == theirs for ours, theirs in zip(texts, plain, strict=True)])
            yield f"| {name} | {100 * right:.2f} % | {100 * (exact - right):.2f} | {100 * same:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="words, of which a row's name has one")
    parser.add_argument("--count", type=int, default=50, help="prompts a task")
    parser.add_argument("--dtype", default="auto", help="of activations: auto is 16 bits on a GPU")
    options = parser.parse_args()
    names = [name for name in METHODS if any(word in name for word in options.only.split(","))]
    print("| | exact answers | points less | 16 bits' own answers |\n|---|---|---|---|", flush=True)
    for row in rows(names, options.count, options.dtype):
        print(row, flush=True)


if __name__ == "__main__":
    main()
