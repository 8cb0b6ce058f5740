"""The table of measured products: kept, merged, looked up. `test_products.py`: what it makes the model do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lmdeploy_jax.bench.quantised import FORMATS
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models import tuning
from lmdeploy_jax.models.tuning import Measurement, Tuning
from lmdeploy_jax.pallas_kernels.skinny_gemm import StreamTiling, Tiling

SMALL, LARGE = Tiling(32, 32, 2, 4, 2), Tiling(32, 64, 1, 4, 2)
measured = partial(Measurement, "w16a16")
TABLE = Tuning(
    (
        measured("parts", 96, 128, 1, SMALL, 1.0, 2.0),
        measured("parts", 96, 128, 8, LARGE, 1.0, 2.0),
        measured("parts", 96, 128, 64, None, 2.0, 2.0),
        measured("gated", 96, 128, 8, Tiling(32, 32, 1, 4, 2), 1.0, 2.0),
        measured("gated", 192, 128, 8, StreamTiling(64, 2, 3), 1.0, 2.0),
        Measurement("w8a8_int8", "parts", 96, 128, 64, LARGE, 1.0, 2.0),
    )
)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / tuning.file_name("NVIDIA H200")
    tuning.write(path, TABLE)
    assert path.name == "nvidia-h200.json"
    assert set(tuning.read(path).products) == set(TABLE.products)
    assert tuning.read(path).prefill_attention is None
    ops = {name: backends[0] for name, backends in tuning.OPS.items() if name != "prefill_attention"}
    tuning.write(path, replace(TABLE, **ops))
    read = tuning.read(path).merged(TABLE)
    assert {name: getattr(read, name) for name in ops} == ops


def test_the_machine_s_own_table_wins(tmp_path):
    shipped = tuning.load("NVIDIA H200")
    assert shipped.products
    first = shipped.products[0]
    own = Measurement(first.format, first.kind, first.out, first.inner, 256, SMALL, 1.0, 2.0)
    tuning.write(tmp_path / "nvidia-h200.json", Tuning((own,)))
    merged = tuning.load("NVIDIA H200", tmp_path)
    assert merged.find(first.format, first.kind, (first.out, first.inner), 3) == SMALL
    assert len(merged.products) > 1
    assert tuning.load("some other card", tmp_path) == Tuning()


def test_what_is_shipped_can_be_done():
    """Every cut fits its shape, and for each quantised format the products of a layer were measured."""
    shipped = tuning.load("NVIDIA H200").products
    for product in shipped:
        assert product.us <= product.xla_us
        if product.tiling is not None:
            product.tiling.check(tokens=product.tokens, inner=product.inner, outputs=product.out)
    for name in ("w4a16_g128", "w8a8_float8_e4m3fn", "w8a8_int8"):
        shapes = {(p.out, p.inner) for p in shipped if p.format == name}
        assert {(6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336)} <= shapes
    assert all(FORMATS[name].held(4096).name in {p.format for p in shipped} for name in ("awq", "fp8"))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"products": [{"kind": 1}]}',
        '{"products": [], "routing": "mosaic"}',
        '{"products": [], "rooting": "pallas"}',
    ],
)
def test_a_broken_table_is_named(tmp_path, text):
    (tmp_path / "nvidia-h200.json").write_text(text)
    with pytest.raises(ConfigError, match=r"nvidia-h200.json cannot be read .*bench tune"):
        tuning.load("NVIDIA H200", tmp_path)


@pytest.mark.parametrize(
    ("tokens", "wanted"), [(1, SMALL), (2, LARGE), (8, LARGE), (9, None), (64, None), (65, None)]
)
def test_the_next_larger_measurement_counts(tokens, wanted):
    assert TABLE.find("w16a16", "parts", (96, 128), tokens) == wanted
    assert TABLE.find("w16a16", "parts", (96, 129), tokens) is None


def test_rows_that_cannot_be_streamed_are_done_as_fewer_are():
    rows = [(1, SMALL), (16, StreamTiling(128, 132, 4)), (64, None)]
    table = Tuning(tuple(measured("gated", 192, 128, tokens, tiling, 1.0, 2.0) for tokens, tiling in rows))
    found = partial(table.find, "w16a16", "gated", (192, 128))
    assert found(4) == found(16, streams=True) == rows[1][1]
    assert found(4, streams=False) == SMALL
    assert found(17, streams=False) is None
    assert TABLE.find("w16a16", "gated", (192, 128), 8, streams=False) is None


def test_each_format_is_measured_by_itself():
    assert TABLE.find("w8a8_int8", "parts", (96, 128), 1) == LARGE
    assert TABLE.find("w4a16_g128", "parts", (96, 128), 1) is None
    int8 = TABLE.merged(Tuning((measured("parts", 96, 128, 256, None, 1.0, 1.0),)))
    assert int8.find("w16a16", "parts", (96, 128), 1) is None  # one shape's measurements go together
    assert int8.find("w8a8_int8", "parts", (96, 128), 1) == LARGE


def test_a_table_of_before_formats_is_read(tmp_path):
    row = '{"kind": "whole", "out": 96, "inner": 128, "tokens": 1, "tiling": null, "us": 1, "xla_us": 1}'
    (tmp_path / "old.json").write_text(f'{{"prefill_attention": null, "products": [{row}]}}')
    assert tuning.read(tmp_path / "old.json").products[0].format == "w16a16"
