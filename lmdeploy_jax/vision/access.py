"""What images may be loaded from, and how large they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdeploy_jax.errors import RequestError

MAX_PIXELS = 89_478_485  # as many as Pillow opens without a warning: a quarter of a gigabyte in RGB


@dataclass(frozen=True)
class MediaAccess:
    """The defaults are for sources that one's own program names: any file, any host.

    trusted: False for sources that somebody else names, as a server's clients do: files only within
        `allowed_local_media_path`, private addresses only of hosts in `allowed_media_domains`.
    allowed_media_domains: the only hosts that are asked; None is all of them.
    max_bytes, max_pixels: most of one image. fetch_timeout: seconds in which it must have come. URLs of one
        prompt are fetched side by side, and have `max_bytes` and `fetch_timeout` together.
    """

    trusted: bool = True
    allowed_media_domains: Sequence[str] | None = None
    allowed_local_media_path: str | Path | None = None
    max_bytes: int = 64 << 20
    max_pixels: int = MAX_PIXELS
    fetch_timeout: float = 10.0

    def names(self, host: str) -> bool:
        """Whether the host may be asked at all."""
        return self.allowed_media_domains is None or host in self.allowed_media_domains

    def may_be_private(self, host: str) -> bool:
        """Whether the host may have an address that is not public."""
        return self.trusted or host in (self.allowed_media_domains or ())

    def allows(self, path: Path) -> bool:
        """Whether the file may be read, where its links lead. Raises what `Path.resolve` does."""
        root = self.allowed_local_media_path
        if root is None:
            return self.trusted
        return path.resolve().is_relative_to(Path(root).resolve())

    def check_size(self, size: int, source: str) -> None:
        """Raises `RequestError` for more bytes than one image may have."""
        if size > self.max_bytes:
            raise RequestError(f"{source}: more than {self.max_bytes} bytes. Send a smaller image.")
