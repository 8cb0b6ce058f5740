"""What takes long tells how far it is, on stderr: stdout belongs to the answers. A terminal and a notebook
get bars, a log a plain line for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock

from tqdm import tqdm


class _Bar(tqdm):
    """Takes turns among threads. tqdm's own lock is one of processes, of whose semaphore Python complains
    where a process is killed, as the engine's is when its start is interrupted.
    """


_Bar.set_lock(RLock())


@contextmanager
def loading_bar(enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback that takes (bytes done, bytes in all), from any thread."""
    lock, told = Lock(), False
    with _bar(enabled, desc="loading", unit="B", unit_scale=True) as bar:

        def on_progress(done: int, total: int) -> None:
            nonlocal told
            with lock:
                if not told:
                    _line(enabled, f"loading {total / 1e9:.2f} GB")
                    told, bar.total = True, total
                bar.update(done - bar.n)

        yield on_progress


@contextmanager
def counting_bar(enabled: bool, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yields a callback that counts so many more of `total` programs; `what` is done to them."""
    if total:
        _line(enabled, f"{what} {total} programs")
    with _bar(enabled and total > 0, desc=f"{what} programs", total=total) as bar:
        yield bar.update


def announce(enabled: bool, text: str) -> None:
    """One line that stays."""
    if enabled:
        print(text, file=sys.stderr, flush=True)


def _line(enabled: bool, text: str) -> None:
    announce(enabled and not _draws_bars(), text)


def _bar(enabled: bool, **options: object) -> tqdm:
    return _Bar(leave=False, file=sys.stderr, disable=not enabled or not _draws_bars(), **options)


def _draws_bars() -> bool:
    """A notebook's stderr is no terminal, and yet goes back to a line's beginning."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
