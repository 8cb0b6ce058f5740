"""A start tells how far it is, on a terminal and in a log, and can be interrupted while it compiles."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import jax
import pytest

from lmdeploy_jax import GenerationConfig
from lmdeploy_jax.engine.core import compile as compiling
from lmdeploy_jax.engine.core.program_cache import ProgramCache
from lmdeploy_jax.engine.progress import announce, counting_bar, loading_bar
from tests.patience import PATIENCE
from tests.scripted import RAW, echo, opener


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(enabled: bool) -> None:
    with loading_bar(enabled) as on_progress:
        for done in (1, 2, 4):
            on_progress(done * 10**9, 4 * 10**9)
    with counting_bar(enabled, "reading", 0) as advance:
        pass
    with counting_bar(enabled, "compiling", 3) as advance:
        for _ in range(3):
            advance(1)
    announce(enabled, "ready")


def test_a_log_gets_a_line_for_each_phase(capsys):
    report(True)
    assert capsys.readouterr() == ("", "loading 4.00 GB\ncompiling 3 programs\nready\n")


def test_a_terminal_gets_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report(True)
    shown = terminal.getvalue()
    assert "loading" in shown
    assert "compiling programs" in shown
    assert "reading" not in shown
    assert shown.endswith("ready\n")


def test_who_wants_no_progress_gets_none(capsys, monkeypatch):
    report(False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    report(False)
    assert sys.stderr.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_answers_is_shown_where_there_is_no_terminal(capsys):
    """In a notebook, for one."""
    with opener() as opened:
        pipe, _ = opened(echo)
        pipe.infer(["a", "b", "c"], GenerationConfig(max_new_tokens=1), use_tqdm=True, **RAW)
    assert "/3" in capsys.readouterr().err


class Slow:
    """A program whose compilation takes until `gate` opens, as XLA's can take minutes."""

    key = ("decode", 1)
    compiler_options: ClassVar[dict[str, str]] = {}

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate
        self.begun = False

    def lower(self) -> Slow:
        return self

    def compile(self, options: dict[str, str]) -> Slow:
        self.begun = True
        self.gate.wait()
        return self


class Interrupted(Slow):
    """Ctrl-C comes while others are being compiled."""

    def __init__(self, gate: threading.Event, others: list[Slow]) -> None:
        super().__init__(gate)
        self.others = others

    def lower(self) -> Slow:
        while not any(other.begun for other in self.others):
            time.sleep(0.001)
        raise KeyboardInterrupt


def test_ctrl_c_while_compiling_waits_for_nothing(capsys):
    gate = threading.Event()
    late = threading.Timer(60, gate.set)  # lets a start that does wait come to its end
    late.start()
    slow = [Slow(gate) for _ in range(40)]
    programs = {("decode", 100 - i): program for i, program in enumerate(slow)}
    programs["decode", 0] = Interrupted(gate, slow)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        compiling.compile_all(programs, ProgramCache(None, jax.devices()), progress=True)
    assert capsys.readouterr().err == "compiling 41 programs\ninterrupted\n"
    assert not gate.is_set(), "it waited for a compilation"
    late.cancel()
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert sum(program.begun for program in slow) <= 16, "it went on with what was queued"


def test_the_command_line_ends_although_a_thread_compiles():
    code = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import lmdeploy_jax.cli.main as front\n"
        "def interrupted(argv):\n"
        "    ThreadPoolExecutor(1).submit(threading.Event().wait)\n"
        "    print('said before', flush=False)\n"
        "    return front.INTERRUPTED\n"
        "front.main = interrupted\n"
        "front.run()\n"
    )
    root = Path(compiling.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (130, "said before\n")


def test_no_semaphore_of_processes_is_left_where_one_is_killed():
    code = """
import multiprocessing.synchronize as s
def refuse(*_, **__): raise AssertionError("a semaphore")
s.SemLock.__init__ = refuse
from lmdeploy_jax.engine.progress import loading_bar
with loading_bar(True) as on_progress: on_progress(1, 2)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
