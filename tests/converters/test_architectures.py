"""The tables of docs/models.md are the code: what runs, against what it was held, what is refused and why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lmdeploy_jax
from lmdeploy_jax.converters.families import FAMILIES, family_of
from lmdeploy_jax.converters.families.refused import REFUSED
from lmdeploy_jax.errors import UnsupportedModelError
from tests.oracle import CONFIGS

PAGE = (Path(lmdeploy_jax.__file__).parent.parent / "docs" / "models.md").read_text()
SUPPORTED, NEEDS = PAGE.split("## Refused")


def test_the_table_of_what_runs_is_the_code():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", SUPPORTED, re.M)
    assert [name for name, _ in rows] == list(FAMILIES)
    held = {case for _, cases in rows for case in re.findall(r"`(\w+)`", cases)} - set(FAMILIES)
    assert held == set(CONFIGS)


def test_the_table_of_what_is_refused_is_the_code():
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|$", NEEDS, re.M)) == REFUSED
    assert not REFUSED.keys() & FAMILIES.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_it_needs(name):
    expected = re.escape(f"architecture {name} is not supported (it needs {REFUSED[name]})")
    with pytest.raises(UnsupportedModelError, match=expected):
        family_of({"architectures": [name]}, "config.json")
