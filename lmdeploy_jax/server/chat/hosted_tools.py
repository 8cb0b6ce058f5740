"""Tools that only their makers' servers run, such as web search: requests go on without them."""

from __future__ import annotations

import logging

logger = logging.getLogger("lmdeploy_jax")
_MOST_TYPES, _LONGEST_TYPE = 64, 64  # that are told of, each once
_told: set[str] = set()


def leave_out(kind: str) -> None:
    """Tell of a type of tools that is left out."""
    kind = kind[:_LONGEST_TYPE]
    if kind not in _told and len(_told) < _MOST_TYPES:
        _told.add(kind)
        logger.warning("this server has no tools of type %a: they are left out of requests", kind)
