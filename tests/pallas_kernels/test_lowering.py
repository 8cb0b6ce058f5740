"""Every kernel lowers for a GPU, which interpret mode does not show: block sizes, unsupported operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest
from jax import export

from tests.pallas_kernels.programs import Model, Program, as_on_h200, decode_step, prefill_step

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

MODELS = [
    Model(head_dim=64, heads=14, kv_heads=2, dtype="bfloat16"),
    Model(head_dim=80, heads=6, kv_heads=6, dtype="float16", window=100, soft_cap=30.0, sinks=True),
    Model(head_dim=96, heads=16, kv_heads=1, dtype="bfloat16", sinks=True),
    Model(head_dim=128, heads=32, kv_heads=8, dtype="float32"),
    Model(head_dim=256, heads=8, kv_heads=4, dtype="bfloat16", window=4096, soft_cap=50.0, lookahead=True),
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
