"""Progress on the terminal for what takes long. Everything goes to stderr: stdout belongs to the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


@contextmanager
def loading_bar(enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback that takes (bytes done, bytes in all)."""
    with _bar(enabled, DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting_bar(enabled: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a callback that counts so many more of `total`."""
    with _bar(enabled, MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def announce(enabled: bool, text: object) -> None:
    """One line that stays."""
    if enabled:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(text), style="dim")


def _bar(enabled: bool, *columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    return Progress(*shown, console=console, transient=True, disable=not enabled or not console.is_terminal)
