"""Messages between two nodes, of which either learns within a bound that the other is lost."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from lmdeploy_jax.errors import EngineError

SILENCE = 30.0  # seconds without a word after which the other side is lost
_BEATS = 10  # words in that time from a side that has nothing to say
_BEAT, _END = b"", b"\0"  # what is no pickle


class Channel:
    """A connection that only the two nodes can write to, since what arrives is unpickled. Any thread may
    send, one may receive.

    name: what the other side is called; lost: told once, on a thread of its own, how it was lost.
    """

    def __init__(
        self, connection: Connection, name: str, lost: Callable[[str], None], *, silence: float = SILENCE
    ) -> None:
        self._connection, self._name, self._lost = connection, name, lost
        self._silence = silence
        self._socket = bounded(connection, silence)
        self._sending = threading.Lock()
        self._received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        for work in (self._read, self._beat):
            threading.Thread(target=work, name=f"lmdeploy_jax {name}", daemon=True).start()

    def send(self, message: Any) -> None:
        """Raises EngineError where nobody takes it."""
        try:
            self._send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise EngineError(f"{self._name} takes no messages: {error}") from error

    def receive(self) -> Any:
        """Waits for the next message. Raises EngineError once the other side is lost."""
        data = self._received.get()
        if data is None:
            self._received.put(None)  # nor will there be any other
            raise EngineError(f"{self._name} is lost")
        return pickle.loads(data)

    def close(self) -> None:
        """What was sent still arrives, and neither side is told of a loss any more."""
        self._closed.set()
        with suppress(OSError):  # it has gone
            self._send(_END)

    def drop(self) -> None:
        """The other side learns of a loss now, unless it has closed."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._connection.send_bytes(data)

    def _read(self) -> None:
        try:
            while (data := self._connection.recv_bytes()) != _END:
                if data != _BEAT:
                    self._received.put(data)
            self._closed.set()
        except BlockingIOError:
            cause = f"said nothing for {self._silence:g} s"
        except (EOFError, OSError):
            cause = "has gone"
        self._received.put(None)
        if not self._closed.is_set():
            self._lost(f"{self._name} {cause}")

    def _beat(self) -> None:
        try:
            while not self._closed.wait(self._silence / _BEATS):
                self._send(_BEAT)
        except OSError:
            return  # the other thread tells of it


def bounded(connection: Connection, seconds: float) -> socket.socket:
    """The connection's socket, on which nothing blocks for longer, and small messages leave at once."""
    shared = socket.socket(fileno=os.dup(connection.fileno()))
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        shared.setsockopt(socket.SOL_SOCKET, option, limit)
    if shared.family == socket.AF_INET:
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return shared
