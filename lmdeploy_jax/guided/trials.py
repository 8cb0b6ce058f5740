"""The processes in which grammars are tried before anything else sees them (see `trial`)."""

from __future__ import annotations

import json
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from lmdeploy_jax.errors import EngineError
from lmdeploy_jax.guided.trial import CPU_SECONDS, MEMORY, WALL_SECONDS, Verdict
from lmdeploy_jax.guided.vocabulary import Vocabulary

PROCESSES = 3  # so that one or two grammars that are slow to try hold nobody up
_PATIENCE = 30.0  # seconds for one of them to become free
_LARGE = 64 * 2**20  # bytes: a process that needed more gives them back by ending
_START = "import sys; sys.path[:] = {!r}; from lmdeploy_jax.guided.trial import main; main({}, {})"
_DEATHS: dict[int, str] = {
    signal.SIGPROF: f"it takes more than {CPU_SECONDS:g} s to compile",
    signal.SIGALRM: f"it is not compiled after {WALL_SECONDS:g} s",
    signal.SIGABRT: f"it takes more than {MEMORY >> 20} MiB of memory to compile",
    signal.SIGSEGV: "it is nested too deeply to compile",
}


class Trials:
    """Tries grammars for one vocabulary. Any thread may ask, and waits; the processes start when needed."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._sent: bytes | None = None
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(PROCESSES)
        self._idle: list[_Process] = []
        weakref.finalize(self, _end, self._idle)

    def of(self, text: str) -> Verdict:
        """Raises `RequestError` for a vocabulary that cannot be used, `EngineError` where too many wait."""
        if not self._free.acquire(timeout=_PATIENCE):
            raise EngineError("Too many grammars wait to be compiled. Try again later.")
        try:
            return self._ask(self._idle_process() or _Process(self._message), text)
        finally:
            self._free.release()

    def _idle_process(self) -> _Process | None:
        """One that waits for work, unless somebody has ended it meanwhile."""
        with self._lock:
            while self._idle:
                process = self._idle.pop()
                if process.alive:
                    return process
                process.end()
        return None

    def _ask(self, process: _Process, text: str) -> Verdict:
        verdict = process.ask(text)
        if verdict.died or verdict.size > _LARGE:
            process.end()
        else:
            self._idle.append(process)
        return verdict

    def _message(self) -> bytes:
        with self._lock:
            if self._sent is None:
                self._sent = pickle.dumps(self._vocabulary())
            return self._sent


def _end(processes: list[_Process]) -> None:
    for process in processes:
        process.end()


class _Process:
    """One of them. It ends with the connection, and so with this process too."""

    def __init__(self, vocabulary: Callable[[], bytes]) -> None:
        here, there = socket.socketpair()
        with here, there:
            number = there.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START.format(sys.path, number, MEMORY)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a panic's trace is no line for the log
                start_new_session=True,  # so that Ctrl-C in the terminal does not reach it
            )
            self._connection = Connection(here.detach())
        try:
            message = vocabulary()  # while it starts
            self._receive()
            self._connection.send_bytes(message)
        except BaseException as error:
            code = self.end()
            if not isinstance(error, OSError | EOFError):
                raise
            raise EngineError(
                f"Grammars cannot be tried: the process for it ended with code {code}."
            ) from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, text: str) -> Verdict:
        """Try a grammar. Where that ends the process, the verdict says so."""
        try:
            self._connection.send_bytes(text.encode())
            return Verdict(*json.loads(self._receive()))
        except (OSError, EOFError):
            return _cause_of_death(self.end())
        except BaseException:  # interrupted: its late answer would be taken for that of the next grammar
            self.end()
            raise

    def _receive(self) -> bytes:
        if not self._connection.poll(2 * WALL_SECONDS):
            self._process.kill()
        return self._connection.recv_bytes()

    def end(self) -> int:
        """Returns the exit code."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)
        self._process.kill()
        return self._process.wait()


def _cause_of_death(code: int) -> Verdict:
    cause = _DEATHS.get(-code)
    return Verdict(cause or f"it ended the compiler (exit code {code})", [], died=True)
