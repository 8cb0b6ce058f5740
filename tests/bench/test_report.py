"""The figures, computed by hand on made-up traces; and the bytes of a step against a real model's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmdeploy_jax.bench import bandwidth, report, shapes
from lmdeploy_jax.bench.run import Run, Trace
from lmdeploy_jax.bench.workloads import Job
from lmdeploy_jax.converters.config import read_config

JOBS = [Job([1] * 10, 3), Job([1] * 20, 3)]
RUN = Run(0.5, [Trace([0.1, 0.2, 0.3]), Trace([0.2, 0.35, 0.4])])


def test_summary() -> None:
    figures = report.summary(JOBS, RUN)
    assert (figures["in_tok"], figures["out_tok"], figures["requests"]) == (30, 6, 2)
    assert (figures["out_tok_s"], figures["total_tok_s"]) == (12.0, 72.0)
    assert figures["ttft_ms"]["mean"] == 150.0
    assert figures["ttft_ms"]["max"] == 200.0
    assert figures["tpot_ms"]["mean"] == 100.0


def test_between_tokens() -> None:
    figures = report.between_tokens(RUN)
    assert (figures["mean"], figures["max"], figures["p50"]) == (100.0, 150.0, 100.0)


def test_steps_count_only_in_lockstep() -> None:
    assert report.step_seconds(JOBS, RUN) == pytest.approx(0.1)  # from 0.2, the last first token, to 0.4
    assert report.step_seconds([Job([1], 3), Job([1], 4)], RUN) is None
    assert report.step_seconds([Job([1], 1)], Run(1.0, [Trace([0.5])])) is None


def test_mean_context() -> None:
    assert sum(report.mean_contexts(JOBS)) == 33.0


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2.5-0.5b", "qwen3-8b"])
def test_step_bytes_are_the_matrices(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shapes.read(name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    config = read_config(tmp_path)
    assert bandwidth.matrix_parameters(config) == linear
    cached = sum(2 * layer.mixer.kv_heads * layer.mixer.head_dim for layer in config.layers)
    assert bandwidth.step_bytes(config, 2, [3.0, 4.0]) == 2 * (linear + 7 * cached)
    mixer = config.layers[0].mixer
    near = replace(mixer, options=replace(mixer.options, window=2))
    config = replace(config, layers=tuple(replace(layer, mixer=near) for layer in config.layers))
    assert bandwidth.step_bytes(config, 2, [1.0, 4.0]) == 2 * (linear + 3 * cached)


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < bandwidth.measure() < 1e14
