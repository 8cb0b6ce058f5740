"""The choice of a backend, and the limits it names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lmdeploy_jax.pallas_kernels.launch import Launch, launch
from lmdeploy_jax.pallas_kernels.registry import resolve, why_not


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
def test_auto_falls_back_for_a_reason_and_pallas_by_name_is_refused(options: dict, reason: str) -> None:
    assert reason in str(why_not(**options))
    assert resolve("auto", **options) == "xla"
    with pytest.raises(ValueError, match=reason):
        resolve("pallas", **options)


def test_a_gpu_gets_the_kernels() -> None:
    assert why_not("gpu", 128, group=8, compute_capability=9.0) is None
    assert resolve("auto", "gpu", 80) == resolve("pallas", "cuda") == "pallas"


def test_names_are_kept_or_refused() -> None:
    assert resolve("xla", "gpu", 128) == "xla"
    assert resolve("pallas_interpret", "cpu") == "pallas_interpret"
    with pytest.raises(ValueError, match="'turbo' is unknown"):
        resolve("turbo", "gpu")


def test_one_byte_arrays_that_pallas_would_misaddress_are_refused() -> None:
    array, how = jax.ShapeDtypeStruct((3 * 2**30,), jnp.int8), Launch("probe", (1,), 4, 1)
    out = jax.ShapeDtypeStruct((1,), jnp.int8)
    with pytest.raises(ValueError, match="at most 2 GiB"):
        jax.eval_shape(lambda x: launch(lambda *_: None, how, out, x, interpret=True), array)
