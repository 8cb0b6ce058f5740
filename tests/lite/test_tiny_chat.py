"""tiny-chat in the formats of `lite`: what it loses, and how much of that calibration wins back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quantised_accuracy import with_outliers
from benchmarks.quantised_formats import written
from benchmarks.shared.tiny_chat_judge import Judge
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.gptq import Gptq
from lmdeploy_jax.lite.methods import Method
from lmdeploy_jax.lite.quantise import Job
from lmdeploy_jax.lite.smooth_quant import SmoothQuant
from lmdeploy_jax.lite.texts import Texts

GROUP = 32


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(Texts(TINY_CHAT).built_in(12, 128), 12, "its own tasks")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(1, 128)


def _made(folder: Path, method: Method, calibration: Calibration | None, source: Path = TINY_CHAT) -> Path:
    Job("tiny-chat", source, folder, method, calibration).run()
    return folder


@pytest.mark.full
@pytest.mark.parametrize("method", [Awq(GROUP), Gptq(GROUP)], ids=lambda method: method.name)
def test_products_err_less_than_if_rounded_to_the_nearest(
    method: Method, calibration: Calibration, tmp_path: Path
) -> None:
    errors = Job("tiny-chat", TINY_CHAT, tmp_path / "out", method, calibration).run()
    found, nearest = ([getattr(error, name) for error in errors] for name in ("output", "nearest"))
    assert sum(found) < 0.95 * sum(nearest)


@pytest.mark.full
def test_gptq_is_nearer_to_the_original(calibration: Calibration, judge: Judge, tmp_path: Path) -> None:
    found = judge.judge(_made(tmp_path / "found", Gptq(GROUP), calibration))[1]
    assert 0 < found < 0.9 * judge.judge(_made(tmp_path / "nearest", Gptq(GROUP), None))[1]


def test_awq_saves_what_a_few_large_columns_would_round_away(
    calibration: Calibration, judge: Judge, tmp_path: Path
) -> None:
    outliers, method = with_outliers(tmp_path / "outliers"), Awq(128, clip=False)
    assert judge.judge(outliers)[1] < 1e-4
    nearest = judge.judge(_made(tmp_path / "nearest", method, None, outliers))[1]
    found = judge.judge(_made(tmp_path / "found", method, calibration, outliers))[1]
    assert nearest > 1  # it says nothing sensible any more
    assert found < 0.02


FOUR_BITS = pytest.param("compressed-tensors, 4 bits, groups of 128", marks=pytest.mark.full)


@pytest.mark.parametrize("name", ["fp8, blocks of 128x128", FOUR_BITS])
def test_what_the_formats_of_other_tools_lose(name: str, judge: Judge, tmp_path: Path) -> None:
    """Nats a token: E4M3 keeps three bits of a mantissa; a wrong scale, or nibble, would cost units."""
    lost = judge.judge(written(name, tmp_path / "out"))[1]
    assert 0 < lost < (1e-2 if "fp8" in name else 0.1)


@pytest.mark.full
@pytest.mark.parametrize("own_layout", [False, True])
def test_smooth_quant_loses_next_to_nothing(
    own_layout: bool, calibration: Calibration, judge: Judge, tmp_path: Path
) -> None:
    assert judge.judge(_made(tmp_path / "smooth", SmoothQuant("int8", own_layout), calibration))[1] < 1e-3
