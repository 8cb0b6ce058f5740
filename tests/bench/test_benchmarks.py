"""The programs in `benchmarks/`: nothing but a person runs them, so they would outlive what they measure."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import benchmarks

NAMES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_what_it_measures_is_where_it_looks_for_it(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").main
