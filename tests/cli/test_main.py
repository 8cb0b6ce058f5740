"""The program's front door: help, version, exit codes, and no tracebacks for mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lmdeploy_jax
from lmdeploy_jax.cli.main import COMMANDS, main

ROOT = Path(lmdeploy_jax.__file__).parent.parent


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["-h"], ["--help"], ["help"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["-v"], ["--version"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == f"lmdeploy_jax {lmdeploy_jax.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lmdeploy_jax {command}")
    assert "  --" in text


@pytest.mark.parametrize(
    ("subcommand", "own", "foreign"),
    [
        ("throughput", "--tp", "--request-rate"),
        ("latency", "--bandwidth", "--tuning-dir"),
        ("serve", "--request-rate", "--tp"),
        ("kernels", "--bandwidth", "--workloads"),
        ("tune", "--tuning-dir", "--bandwidth"),
    ],
)
def test_each_benchmark_has_its_own_flags(
    subcommand: str, own: str, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", subcommand, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lmdeploy_jax bench {subcommand} ")
    assert f"  {own} " in text
    assert foreign not in text
    assert main(["bench", subcommand, "x", foreign, "1"]) == 2
    assert foreign[2:].replace("-", "_") in capsys.readouterr().err
    assert "_" not in text.partition("usage: lmdeploy_jax")[2].split("Work:")[0]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["talk"], 2, "Unknown command 'talk'"),
        (["chat", "--tpp", "2"], 2, "tpp"),
        (["serve", "x", "--max-model-len=9"], 2, "no flag --max-model-len here; its like is --session-len"),
        (["chat", "--port", "9"], 2, "Unknown command line flag 'port'"),  # nor is there its like
        (["chat", "a", "b"], 2, "one model"),
        (["chat", "--tp", "two"], 2, "--tp=two: a whole number is needed"),
        (["chat", "--top-p", "x"], 2, "--top_p=x: a number is needed"),
        (["chta"], 2, "Did you mean chat?"),
        (["lite", "tiny-chat"], 2, "lite does one of"),
        (["lite", "awq", "--calib-samples", "8"], 2, "lite does one of"),  # not: an unknown flag
        (["bench", "serve", "localhost:23333"], 2, "url='localhost:23333' is no URL of a server"),
        (["chat", "--url", "localhost:23333"], 2, "give one like http://localhost:23333"),
        (["bench", "latency", "/no/such/folder"], 1, "/no/such/folder"),  # before anything is measured
        (["bench", "thruput", "--tp", "2"], 2, "bench does one of"),
        (["lite", "fp8"], 2, "usage: lmdeploy_jax lite fp8 MODEL"),
        (["lite", "fp8", "/no/such/folder"], 1, "/no/such/folder"),
        (["list"], 2, "README"),
        (["chat", "--temperature", "9"], 2, "temperature"),
        (["chat", "--tp", "0"], 2, "tp"),
        (["chat", "--session-len", "-1"], 2, "session_len"),
        (["chat", "--log-level", "LOUD"], 2, "log_level"),
        (["serve", "apiserver"], 2, "usage: lmdeploy_jax serve [api_server] [MODEL]"),
        (["serve", "gradio"], 2, "api_server and proxy"),
        (["serve", "api_server", "a", "b"], 2, "one model"),
        (["serve", "api-server", "/no/such/folder"], 1, "/no/such/folder"),
        (["serve", "/no/such/folder"], 1, "/no/such/folder"),
        (["chat", "/no/such/folder"], 1, "/no/such/folder"),
        (["convert", "only-one"], 2, "usage"),
        (["convert", "/no/such/folder", "/no/such/out"], 1, "/no/such/folder"),
        (["bench", "throughput"], 2, "usage"),
        (["bench", "throughput", "tiny-llama", "--workloads", "b7"], 2, "b7"),
        (["check_env", "--dump-file", "x.pkl"], 2, "x.pkl"),
        (["check-env", "x"], 2, "no argument"),
    ],
)
def test_mistakes_end_in_one_line(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("lmdeploy_jax: ")
    assert text in out.err
    assert out.err.count("\n") == 1


def test_module_and_closed_pipe() -> None:
    command = f"{sys.executable} -m lmdeploy_jax chat --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "usage: lmdeploy_jax chat [MODEL] [FLAGS]\n"
    assert done.stderr == ""


def test_letters_that_a_terminal_lacks_end_nothing() -> None:
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "lmdeploy_jax", "serve", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=ascii_only, capture_output=True, text=True, check=True)
    assert "TEXT,TEXT,?" in done.stdout
