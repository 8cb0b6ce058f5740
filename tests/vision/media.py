"""Files that are images or videos, and a server that has some, or stalls, or leads elsewhere."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

LEVELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def encoded(kind: str = "PNG", levels: np.ndarray | Image.Image = LEVELS) -> bytes:
    file = BytesIO()
    image = levels if isinstance(levels, Image.Image) else Image.fromarray(levels)
    image.save(file, kind)
    return file.getvalue()


PNG = encoded()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def movie(format: str = "mp4", codec: str = "mpeg4") -> bytes:
    """Twelve grey frames, each lighter than the one before it, five in a second."""
    av = pytest.importorskip("av")
    held = BytesIO()
    with av.open(held, "w", format=format) as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (20 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return held.getvalue()


class MediaSite(ThreadingHTTPServer):
    """/png: an image; /N: N redirects to it; /away: a redirect to `away`; /slow: an image once `let_go` is
    set; /endless: bytes for ever; other names: what `files` has, or no image.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.files = {"png": PNG, "slow": PNG}
        self.away = ""
        self.let_go, self.hung_up = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: MediaSite

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.strip("/")
        if name == "slow":
            self.server.let_go.wait()
        if name == "away" or name.isdecimal():
            self.send_response(302)
            target = self.server.away if name == "away" else f"/{int(name) - 1}" if int(name) > 1 else "/png"
            self.send_header("location", target)
            self.end_headers()
            return
        try:
            self.send_response(404 if name == "missing" else 200)
            self.end_headers()
            self.wfile.write(self.server.files.get(name, b"<html>no image</html>"))
            while name == "endless":
                self.wfile.write(bytes(1 << 16))
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def media_site() -> Iterator[MediaSite]:
    with MediaSite() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.let_go.set()
            server.shutdown()
