"""How many cases a fuzz draws: sixty in each run, always the same, and the whole of it with `-m full`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

FEW = 60


def cases(full: int) -> pytest.MarkDecorator:
    """Gives a test its number of cases as the argument `cases`: `FEW`, and `full` where that is asked for."""
    return pytest.mark.parametrize("cases", [FEW, pytest.param(full, marks=pytest.mark.full)])


def drawn(cases: int) -> settings:
    """Hypothesis's settings for that many cases: the same in each run, and none too slow for the clock."""
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
