"""The choice of a backend, and the limits it names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.registry import why_not


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"platform": "cpu"}, "need an NVIDIA GPU; the platform is cpu"),
        ({"platform": "gpu", "head_dim": 512}, "head_dim 512"),
        ({"platform": "gpu", "dtype": "int8"}, "KV cache of int8"),
        ({"platform": "gpu", "group": 32}, "32 query heads a KV head"),
        ({"platform": "gpu", "compute_capability": 7.5}, "compute capability 7.5"),
    ],
)
def test_what_the_kernels_cannot_serve_has_a_reason(options: dict, reason: str) -> None:
    assert reason in str(why_not(**options))


def test_a_gpu_gets_the_kernels() -> None:
    assert why_not("gpu", 128, group=8, compute_capability=9.0) is None
    assert why_not("gpu", 80) is why_not("cuda") is None


def test_one_byte_arrays_that_pallas_would_misaddress_are_refused() -> None:
    array, how = jax.ShapeDtypeStruct((3 * 2**30,), jnp.int8), Launch("probe", (1,), 4, 1)
    out = jax.ShapeDtypeStruct((1,), jnp.int8)
    with pytest.raises(ValueError, match="at most 2 GiB"):
        jax.eval_shape(lambda x: launch(lambda *_: None, how, out, x, interpret=True), array)
