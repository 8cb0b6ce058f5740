"""The project's logger, and LMDeploy's extra level for requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lmdeploy_jax.errors import ConfigError

REQUEST = 15  # between DEBUG and INFO: prompts and their generation config
logger = logging.getLogger("lmdeploy_jax")
logging.addLevelName(REQUEST, "REQUEST")


def set_level(level: str | int) -> None:
    """Set how much is logged. Writes to stderr unless the program has set up logging itself.

    Raises `ConfigError` for a name that is no level.
    """
    try:
        logger.setLevel(level.upper() if isinstance(level, str) else level)
    except ValueError as e:
        raise ConfigError(
            f"log_level={level!r} is invalid: give CRITICAL, ERROR, WARNING, INFO, REQUEST or DEBUG."
        ) from e
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # libraries that set up the root logger later would print every line again


def shortened(text: str | Sequence[int], limit: int | None) -> str:
    """`text` (or token ids) for a log line: its first `limit` characters (ids), and how much was left out."""
    if limit is None or len(text) <= limit:
        return str(text)
    return f"{text[:limit]}... ({len(text) - limit} more)"
