"""`bench` from the command line to its JSON lines, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy_jax.cli.main import main

FLAGS = [
    "--workloads=smoke",
    "--reps=1",
    "--bandwidth=10",
    "--max-batch-size=4",
    "--max-prefill-token-num=128",
    "--session-len=128",
    "--eager-mode",
]


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_lines(
    mode: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path_factory.getbasetemp() / "shapes"
    out = tmp_path / "out.jsonl"
    command = ["bench", mode, "tiny-qwen2", "--checkpoint-dir", str(root), "--out", str(out), *FLAGS]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    (line,) = map(json.loads, printed.splitlines())
    assert (line["model"], line["workload"], line["mode"], line["rep"]) == ("tiny-qwen2", "smoke", mode, 0)
    assert (line["requests"], line["in_tok"], line["out_tok"]) == (4, 128, 32)
    assert line["out_tok_s"] == pytest.approx(32 / line["wall_s"], rel=0.01)
    assert line["compilations_while_serving"] == 0
    assert 0 < line["bandwidth_share"] < 10
    assert ("between_tokens_ms" in line) == (mode == "latency")


def test_a_model_of_a_small_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "tiny-chat", *FLAGS]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["out_tok"], line["ids_below"]) == (32, 2560)


def test_a_mixture_tells_how_many_experts_the_limit_reads(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of random experts in MXFP4, with an attention that is not quantised."""
    made = ["--checkpoint-dir", str(tmp_path_factory.getbasetemp() / "shapes"), "--model-format", "mxfp4"]
    assert main(["bench", "throughput", "tiny-gpt-oss", *made, *FLAGS]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["experts_if_uniform"] == 5.5  # 8 (1 - 0.75 ** 4), of four sequences that choose two each
