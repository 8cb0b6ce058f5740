"""Which implementation serves an op on a device, and why one does not."""

from __future__ import annotations

BACKENDS = ("xla", "pallas", "pallas_interpret")


def check_backend(backend: str) -> None:
    """Raises ValueError unless `backend` names an implementation."""
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
