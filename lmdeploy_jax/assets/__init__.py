"""The tiny models that ship with the package."""

from __future__ import annotations

from pathlib import Path

TINY_CHAT: Path = Path(__file__).parent / "tiny-chat"

_EMBEDDED: dict[str, Path] = {"tiny-chat": TINY_CHAT}


def names() -> tuple[str, ...]:
    """What the embedded models are called."""
    return tuple(_EMBEDDED)


def resolve(name: str) -> Path | None:
    """The folder of an embedded model, or None where `name` isn't one."""
    return _EMBEDDED.get(name)
