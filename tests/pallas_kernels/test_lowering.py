"""Every kernel lowers for a GPU, which interpret mode does not show: block sizes, unsupported operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax import export

from lmdeploy_jax.pallas_kernels.grouped_matmul import fused_experts
from lmdeploy_jax.pallas_kernels.kv_formats import E4M3, INT4, INT8
from lmdeploy_jax.pallas_kernels.quant_gemm import quant_gemm
from lmdeploy_jax.pallas_kernels.quant_gemm.words import PER_WORD
from lmdeploy_jax.pallas_kernels.round_rows import round_rows
from lmdeploy_jax.pallas_kernels.shapes import Quantised
from lmdeploy_jax.pallas_kernels.skinny_gemm import Tiling
from tests.pallas_kernels.programs import Model, Program, as_on_h200, decode_step, prefill_step

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

MODELS = [
    Model(head_dim=64, heads=14, kv_heads=2, dtype="bfloat16"),
    Model(head_dim=80, heads=6, kv_heads=6, dtype="float16", window=100, soft_cap=30.0, sinks=True),
    Model(head_dim=96, heads=16, kv_heads=1, dtype="bfloat16", sinks=True),
    Model(head_dim=128, heads=32, kv_heads=8, dtype="float32"),
    Model(head_dim=256, heads=8, kv_heads=4, dtype="bfloat16", window=4096, soft_cap=50.0, lookahead=True),
    Model(head_dim=128, heads=32, kv_heads=8, dtype="bfloat16", form=INT8),
    Model(head_dim=64, heads=14, kv_heads=2, dtype="float16", window=100, sinks=True, form=INT4),
    Model(head_dim=256, heads=8, kv_heads=4, dtype="bfloat16", soft_cap=50.0, lookahead=True, form=E4M3),
]
TRITON_CALL = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("step", [decode_step, prefill_step])
def test_lowers_for_a_gpu(step: Callable[[Model, int], Program], model: Model) -> None:
    program = step(model, 1)
    with as_on_h200():
        lower = export.export(jax.jit(program.function), platforms=["cuda"], disabled_checks=[TRITON_CALL])
        module = lower(*program.specs).mlir_module()
    kernels = ["paged_attention"] if step is decode_step else ["rope_kv_write", "prefill_attention"]
    for kernel in kernels:
        assert f'name = "{kernel}"' in module


MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")


@pytest.mark.parametrize(("hidden", "inner"), [(256, 128), (320, 192)])  # with runs that no block has
def test_a_fused_mixture_lowers_for_a_gpu(hidden: int, inner: int) -> None:
    def step(x: jax.Array, gate_up: jax.Array, down: jax.Array, experts: jax.Array, scales: jax.Array) -> Any:
        gating = lambda gate, up: jax.nn.silu(gate) * up  # noqa: E731
        return fused_experts(x, gate_up, down, experts, scales, gating=gating)

    shape, chosen = jax.ShapeDtypeStruct, (512, 2)
    weights = shape((8, 2, inner, hidden), "bfloat16"), shape((8, hidden, inner), "bfloat16")
    specs = (shape((512, hidden), "bfloat16"), *weights, shape(chosen, "int32"), shape(chosen, "float32"))
    with as_on_h200():
        checks = [TRITON_CALL, MOSAIC_CALL]
        module = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)(
            *specs
        ).mlir_module()
    assert module.count("mosaic_gpu_v2") == 2
    for name in ("count_groups", "place_rows", "spread_rows", "combine_rows"):
        assert f'name = "{name}"' in module


QUANTISED = {"float8_e4m3fn": 1, "int8": 2, "uint16": 4}  # values of a weight, and groups of its columns


@pytest.mark.parametrize("values", QUANTISED)
@pytest.mark.parametrize("outputs", [128, 100])  # with rows that no tile has
def test_quantised_products_lower_for_a_gpu(values: str, outputs: int) -> None:
    groups, words = QUANTISED[values], values == "uint16"

    def step(x: jax.Array, weight: list[jax.Array]) -> jax.Array:
        rows = x if words else round_rows(x, values, groups=groups, backend="pallas")
        tiling = Tiling(64, 128, 2, 4, 3)
        return quant_gemm(rows, Quantised(*weight), tiling, out_dtype="float32", backend="pallas")

    shape = jax.ShapeDtypeStruct
    weight = [
        shape((outputs, 512 // PER_WORD if words else 512), values),
        shape((groups, outputs), "float32"),
    ]
    weight += [shape((groups, outputs), "uint8")] if words else []
    with as_on_h200():
        lower = export.export(jax.jit(step), platforms=["cuda"], disabled_checks=[TRITON_CALL])
        module = lower(shape((5, 512), "bfloat16"), weight).mlir_module()
    assert 'name = "quant_gemm"' in module
    assert ('name = "round_rows"' in module) != words
