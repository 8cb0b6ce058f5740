"""Processes forked from one with an open engine: its threads, and JAX's, are not in them, so that waiting for
either would never end.
"""

from __future__ import annotations

import os

from lmdeploy_jax.errors import EngineError

_REMEDY = (
    "Open the pipeline in the process that uses it, and start processes with "
    "multiprocessing.get_context('spawn')."
)
_user_of_jax: int | None = None  # the process in which the first engine was opened


def claim_jax() -> None:
    """To be called before JAX's first use. Raises EngineError where JAX was used before this process was
    forked off.
    """
    global _user_of_jax
    if _user_of_jax is None:
        _user_of_jax = os.getpid()
    elif _user_of_jax != os.getpid():
        raise EngineError(
            f"No engine can be opened here: process {_user_of_jax} had opened one before this process was "
            f"forked from it, and JAX does not survive a fork. {_REMEDY}"
        )


class OwnerProcess:
    """The process that an engine was opened in."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_current(self) -> bool:
        """Whether this is that process, and not a fork of it."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raises EngineError in a fork."""
        if not self.is_current:
            raise EngineError(
                f"This engine was opened in process {self._process}, not in this one, a fork of it. {_REMEDY}"
            )
