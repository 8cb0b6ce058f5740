"""The choice of experts: the kernel takes those that XLA takes, and weighs them alike."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.topk_routing import TopK, norm_topk_routing, topk_routing

BACKENDS = ["pallas_interpret", pytest.param("pallas", marks=pytest.mark.gpu)]
CASES = [  # experts, with a correction, with a bias, options
    (8, False, False, TopK(1)),
    (128, False, False, TopK(8, normalise=True)),
    (32, False, True, TopK(4, "chosen")),
    (40, True, True, TopK(6, "sigmoid", normalise=True, scale=2.5, groups=5, top_groups=2)),
    (160, False, False, TopK(6, scale=16.0, groups=8, top_groups=3, group_score="max")),
    (6, True, False, TopK(3, "sigmoid", groups=3)),  # more than the groups that count have
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("experts", "corrected", "biased", "options"), CASES, ids=str)
def test_the_kernel_chooses_what_xla_chooses(experts, corrected, biased, options, backend):
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, experts)).astype(np.float32)
    logits[1] = 0  # all alike
    logits[2, ::2] = logits[2, 1::2]  # pairs of equals
    logits[3] = 300 * logits[3]  # most weights vanish
    correction = jnp.asarray(rng.normal(size=experts), jnp.float32) if corrected else None
    bias = jnp.asarray(rng.normal(size=experts), jnp.float32) if biased else None
    halves = jnp.asarray(logits / 2)  # powers of two: their sums are exact
    found, wanted = (
        topk_routing(given, correction, options, bias=bias, backend=each)
        for given, each in ((jnp.stack([halves, halves]), backend), (2 * halves, "xla"))
    )
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-30)


def test_experts_that_do_not_exist_are_never_chosen():
    """Whatever the logits are: an expert's number is an address."""
    logits = jnp.full((1, 6), jnp.nan)
    experts, _ = topk_routing(logits, None, TopK(2), backend="pallas_interpret")
    assert ((experts >= 0) & (experts < 6)).all()


def test_more_experts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="5 experts a token cannot be chosen among 4"):
        topk_routing(jnp.zeros((1, 4)), None, TopK(5), backend="xla")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("experts", "size"), [(6, 40), (24, 2100)])
def test_a_router_s_norm_product_and_choice_are_one_kernel(experts, size, backend):
    """With fewer experts than a block of them has, and with several blocks, which experts do not fill."""
    if backend == "pallas" and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    normal = np.random.default_rng(0).normal
    shapes = (3, size), (2, 3, size), (size,), (experts, size), (experts,), (experts,)
    x, delta, norm, router, correction, bias = (jnp.asarray(normal(size=s), jnp.float32) for s in shapes)
    how = {"bias": bias, "eps": 1e-6, "offset": 1.0}
    options = TopK(3, "sigmoid", normalise=True, scale=2.0)
    run = partial(norm_topk_routing, x, delta, norm, router, correction, options, **how)
    found, wanted = run(backend=backend), run(backend="xla")
    np.testing.assert_array_equal(found[2], wanted[2])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
