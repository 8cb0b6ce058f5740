"""Python's garbage collector in processes that serve: seldom between two tokens."""

from __future__ import annotations

import gc

# Net allocations between two passes over the youngest objects, and how many of those between two over older
# ones. Python's own (700, 10, 10) walk everything that a burst of requests brings, for tens of milliseconds.
# All garbage is still found within some thousand requests.
THRESHOLDS = (10_000, 20, 10)


def freeze() -> None:
    """What is there now stays, and need not be walked again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
