"""What `bench tune` would measure, told without a GPU: the shapes, the cuts, what they cost elsewhere."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmdeploy_jax.bench import quant_tune, shapes, tune
from lmdeploy_jax.bench.quantised import FORMATS, FP8_BLOCKS
from lmdeploy_jax.converters.families import build_config
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling


def config(name: str) -> DecoderConfig:
    return build_config(shapes.read(name), name)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_each_device_has_its_share_of_a_product(tp):
    sizes = {name: (shape.out, shape.inner) for name, shape in tune.products(config("llama3-8b"), tp).items()}
    assert sizes["qkv"] == sizes["norm_qkv"] == (6144 // tp, 4096)
    assert (sizes["o"], sizes["down"]) == ((4096, 4096 // tp), (4096, 14336 // tp))
    assert sizes["gate_up"] == sizes["norm_gate_up"] == (14336 // tp, 4096)
    assert sizes["head"] == (128256 // tp, 4096)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_every_share_has_cuts_worth_measuring(tp):
    for shape in tune.products(config("llama3-8b"), tp).values():
        assert list(tune.tilings(shape, 1)), shape


def test_a_model_that_cannot_be_shared_out_is_told():
    with pytest.raises(ConfigError, match="tp=4 cannot share out 14 attention heads"):
        tune.products(config("qwen2.5-0.5b"), 4)


def test_a_kernel_that_sums_over_devices_reads_parts_as_on_one():
    """It norms too, so that no product has a norm before it."""
    products = tune.products(config("llama3-8b"), 2, peers=True)
    assert not any(shape.summed or shape.normed for shape in products.values())
    assert tune.products(config("llama3-8b"), peers=True) == tune.products(config("llama3-8b"))


def test_parts_that_travel_between_devices_cost_what_they_weigh():
    """Many rows in parts are added up before they travel, in a kernel of its own."""
    alone, shared = (tune.products(config("llama3-8b"), tp)["o"] for tp in (1, 2))
    whole, parts = Tiling(64, 128, 1, 4, 4), Tiling(64, 128, 4, 4, 4)
    costs = {
        (shape.summed, tokens): tune.extra_seconds(shape, parts, tokens)
        - tune.extra_seconds(shape, whole, tokens)
        for shape in (alone, shared)
        for tokens in (1, 128)
    }
    assert 0 < costs[False, 1] < costs[True, 1] < 1e-6
    assert tune.extra_seconds(shared, parts, 128) - tune.extra_seconds(alone, parts, 128) == pytest.approx(
        2e-6
    )


def test_what_a_product_launches_beside_itself_is_counted():
    """XLA scales its sums in a kernel of their own, what no norm rounds is rounded in another."""
    named = tune.products(config("llama3-8b"))
    held, few, streams = FORMATS["fp8"].held, Tiling(64, 128, 4, 4, 4), StreamTiling(128, 132, 4)
    launches = {
        name: [
            quant_tune.Quantised(named[name], held(4096)).more_launches(way) for way in (None, few, streams)
        ]
        for name in ("qkv", "o", "gate_up", "head")
    }
    assert launches == {"qkv": [1, 0, 0], "o": [2, 1, 1], "gate_up": [0, 0, 1], "head": [2, 1, 1]}
    assert "head" in quant_tune.products_of(held(4096))
    assert "head" not in quant_tune.products_of(FORMATS["awq"].held(4096))


DENSE = [*(form for name, form in FORMATS.items() if name != "mxfp4"), FP8_BLOCKS]


@pytest.mark.parametrize("form", DENSE, ids=lambda form: form.held(4096).name)
def test_quantised_products_are_timed_as_the_engine_does_them(form):
    """Every product of a layer has cuts that the kernels take, whose result is that of XLA's."""
    for name in quant_tune.QUANTISED:
        shape = tune.products(config("llama3-8b"))[name]
        found = quant_tune.norm_tilings if shape.normed else quant_tune.tilings
        candidates = list(found(quant_tune.Quantised(shape, form.held(shape.inner))))
        assert len(candidates) >= 2
    shape = tune.Shape(64, 256, "gated" if form is FP8_BLOCKS else "parts")
    product = quant_tune.Quantised(shape, form.held(256), "pallas_interpret")
    leaves = product.weight(jax.random.key(0))
    tiling = Tiling(32, 128, 1 if shape.kind == "gated" else 2, 4, 3)
    got, want = (
        np.asarray(product.function(way)(product.rows(3, way), leaves), np.float32) for way in (tiling, None)
    )
    got = got if shape.kind == "gated" else got.sum(0)
    # XLA's product of blocks takes activations of 16 bits.
    assert np.linalg.norm(got - want) < (0.06 if form is FP8_BLOCKS else 5e-3) * np.linalg.norm(want)
