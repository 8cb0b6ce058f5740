"""How tests wait: for something to happen, however slow the machine is.

`PATIENCE` only ends what hangs for ever, and is what such a defect costs a run. No test may come near it, and
none may be shorter-tempered: what a test says about speed is a ratio, or belongs into a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import httpx

PATIENCE = 120.0  # seconds

get, post = partial(httpx.get, timeout=PATIENCE), partial(httpx.post, timeout=PATIENCE)
stream = partial(httpx.stream, timeout=PATIENCE)


def wait_until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
