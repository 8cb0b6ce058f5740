"""The tiny models that ship with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

TINY_CHAT: Path = _FOLDER / "tiny-chat"
TINY_MOE: Path = _FOLDER / "tiny-moe"
TINY_VISION: Path = _FOLDER / "tiny-vision"
EXAMPLE_IMAGE: Path = _FOLDER / "shapes.png"  # one that `vision_tasks` drew: three shapes in their places

_EMBEDDED: dict[str, Path] = {"tiny-chat": TINY_CHAT, "tiny-moe": TINY_MOE, "tiny-vision": TINY_VISION}


def names() -> tuple[str, ...]:
    """What the embedded models are called."""
    return tuple(_EMBEDDED)


def resolve(name: str) -> Path | None:
    """The folder of an embedded model, or None where `name` isn't one."""
    return _EMBEDDED.get(name)
