"""The public formats that are written: a module's tensors, and what config.json says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmdeploy_jax.lite.rounding import Rounded

Tensors = dict[str, np.ndarray]
PACKED = 8  # 4-bit integers in a word
IN_ORDER = tuple(range(PACKED))
ONES = np.int32(0x11111111)  # 1 in each nibble of a word; no zero point that is written is 0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of a word, the lowest first


class Layout(Protocol):
    """How a format stores a module."""

    outputs: ClassVar[int]
    """What a module's number of outputs must be a multiple of."""

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        """Of scales, where the original has the weight in `plain`."""

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        """A module's, by what stands behind its name."""

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        """`quantization_config`. plain_modules: names of linear layers that are not quantised."""


@dataclass(frozen=True)
class AwqLayout:
    """AutoAWQ's `gemm`, which LMDeploy's `auto_awq` writes too."""

    group: int
    outputs: ClassVar[int] = PACKED

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        return np.dtype(np.float16)

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        assert rounded.zeros is not None
        return {
            "qweight": np.asarray(_pack(rounded.codes, AWQ_ORDER, turned=True)),
            "qzeros": np.asarray(_pack(rounded.zeros, AWQ_ORDER, turned=True)),
            "scales": np.asarray(rounded.scales).T.astype(np.float16),
        }

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "modules_to_not_convert": [name for name in plain_modules if name != "lm_head"] or None,
        }


@dataclass(frozen=True)
class GptqLayout:
    """AutoGPTQ's, whose zero points are stored less 1."""

    group: int
    outputs: ClassVar[int] = PACKED

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        return np.dtype(np.float16)

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        assert rounded.zeros is not None
        columns = rounded.codes.shape[1]
        return {
            "qweight": np.asarray(_pack(rounded.codes)).T,
            "qzeros": np.asarray(_pack(rounded.zeros, turned=True)) - ONES,
            "scales": np.asarray(rounded.scales).T.astype(np.float16),
            "g_idx": np.arange(columns, dtype=np.int32) // self.group,
        }

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        within = [name for name in plain_modules if name != "lm_head"]
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": True,
            "desc_act": False,
            "static_groups": True,
            "lm_head": False,
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in within}} if within else {}),
        }


@dataclass(frozen=True)
class CompressedLayout:
    """compressed-tensors with a scale a row, for activations that are rounded as they come, by token."""

    kind: str
    """Of weights and activations: float, which is FP8 (E4M3), or int."""
    outputs: ClassVar[int] = 1

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        """float16 has no room for the scales of small weights."""
        return np.dtype(np.float32) if plain == np.float16 else plain

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        scales = np.asarray(rounded.scales).astype(self.scale_dtype(plain))
        return {"weight": np.asarray(rounded.codes), "weight_scale": scales}

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        each = {"num_bits": 8, "type": self.kind, "symmetric": True}
        weights = {**each, "strategy": "channel", "dynamic": False}
        activations = {**each, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        return {
            "quant_method": "compressed-tensors",
            "format": f"{self.kind}-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(plain_modules),
        }


@dataclass(frozen=True)
class SmoothQuantLayout:
    """What LMDeploy's `smooth_quant` writes, and no other engine reads."""

    quant_dtype: str
    outputs: ClassVar[int] = 1

    def scale_dtype(self, plain: np.dtype) -> np.dtype:
        return np.dtype(np.float32)

    def tensors(self, rounded: Rounded, plain: np.dtype) -> Tensors:
        return {"weight": np.asarray(rounded.codes), "scale": np.asarray(rounded.scales)}

    def settings(self, plain_modules: Sequence[str]) -> Mapping[str, Any]:
        return {
            "quant_method": "smooth_quant",
            "quant_dtype": self.quant_dtype,
            "modules_to_not_convert": list(plain_modules),
        }


@partial(jax.jit, static_argnums=1, static_argnames="turned")
def _pack(values: Array, order: tuple[int, ...] = IN_ORDER, *, turned: bool = False) -> Array:
    """4-bit integers [a, n], perhaps turned to [n, a] first -> int32 [a, n / 8], of each word `order` in its
    nibbles, the lowest first.
    """
    values = values.T if turned else values
    each = values.astype(jnp.int32).astype(jnp.uint32) & 15
    each = each.reshape(len(values), -1, PACKED)[..., jnp.array(order)]
    words = (each << (4 * jnp.arange(PACKED, dtype=jnp.uint32))).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)
