"""The process that makes HTML of answers, so that no text can hold up the one that serves."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection

from lmdeploy_jax.errors import EngineError, RequestError

MOST_SECONDS = 20.0  # of the processor's time, for one text; a hostile one takes one or two
_PATIENCE = 120.0  # seconds, the start of the process included, on a machine that is busy
_START = "import sys; sys.path[:] = {!r}; from lmdeploy_jax.server.page.renderer import main; main({})"


def main(number: int) -> None:
    """Answers on the connection with this file number until it ends: texts come, JSON goes."""
    from lmdeploy_jax.server.page.markdown import (
        render,
    )  # takes a while, and the serving process has no use for it

    with Connection(number) as connection, suppress(EOFError):
        while True:
            text = connection.recv_bytes().decode()
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)  # ends this process
            rendered = asdict(render(text))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            connection.send_bytes(json.dumps(rendered).encode())


class Renderer:
    """Asks that process, which starts when it is first needed. Any thread may ask; one text at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def render(self, text: str) -> bytes:
        """JSON with the fields of `markdown.Rendered`.

        Raises `RequestError` for a text that ends the process, as one that takes too long does, and
        `EngineError` where there can be no process.
        """
        with self._lock:
            if self._process is None or not self._process.alive:
                self._process = _Process()
            return self._process.ask(text)


class _Process:
    """It ends with the connection, and so with this process too."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        with here, there:
            number = there.fileno()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START.format(sys.path, number)],
                    pass_fds=[number],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # so that Ctrl-C in the terminal does not reach it
                )
            except OSError as error:
                raise EngineError(f"The process that renders Markdown cannot be started: {error}.") from error
            self._connection = Connection(here.detach())

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, text: str) -> bytes:
        try:
            self._connection.send_bytes(text.encode(errors="replace"))
            if not self._connection.poll(_PATIENCE):
                self._process.kill()
            return self._connection.recv_bytes()
        except (OSError, EOFError) as error:
            self._connection.close()
            code = self._process.wait()
            raise RequestError(f"The text cannot be rendered: its process ended with code {code}.") from error
