"""`lite fp8`: what it writes is read by transformers and by the package, and a run goes on where it ended."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cli import lite
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.lite.methods import Fp8
from lmdeploy_jax.lite.quantise import Job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lite") / "fp8"
    assert main(["lite", "fp8", "tiny-chat", "--work-dir", str(out)]) == 0
    return out


def test_transformers_reads_the_same_weights(made: Path) -> None:
    _assert_read_alike(made)


@pytest.mark.full
def test_transformers_reads_the_same_integers(tmp_path: Path) -> None:
    flags = ["--work-dir", str(tmp_path / "int8"), "--calib-samples", "8", "--calib-seqlen", "64"]
    assert main(["lite", "smooth_quant", "tiny-chat", *flags]) == 0
    _assert_read_alike(tmp_path / "int8")


def _assert_read_alike(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = _leaves(folder)
    for name, leaf in (("mlp.down_proj", "mlp.down"), ("self_attn.o_proj", "attention.o")):
        weight, scale = (
            theirs[f"model.layers.3.{name}.{role}"].float() for role in ("weight", "weight_scale")
        )
        found = ours[f"layers.3.{leaf}.weight"]
        np.testing.assert_array_equal(found.reshape(weight.shape), (weight * scale).numpy())


def test_only_linear_layers_change_and_by_little(made: Path) -> None:
    before, after = _leaves(TINY_CHAT), _leaves(made)
    for name, weight in before.items():
        error = np.linalg.norm(after[name] - weight) / np.linalg.norm(weight)
        linear = name.startswith("layers.") and "norm" not in name
        assert (0.02 < error < 0.03) if linear else error == 0, name


def test_the_folder_is_complete(made: Path) -> None:
    names = {file.name for file in made.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "lite_report.json"} <= names
    assert "`lmdeploy_jax lite fp8`" in (made / "README.md").read_text()
    assert len(json.loads((made / "lite_report.json").read_text())["errors"]) == 4 * 4
    assert not {name for name in names if "job" in name or "partial" in name}


def test_an_interrupted_run_goes_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    command = ["lite", "fp8", "tiny-chat", "--work-dir", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(lite, "_tell", interrupt)
        assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(kept) == 3
    assert not (out / "config.json").exists()  # nothing takes it for a checkpoint
    assert main([*command, "--dtype", "float16"]) == 2
    assert "with other settings" in capsys.readouterr().err
    assert main(command) == 0
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in out.iterdir()}.items()
    for file in made.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_cannot_be_quantised(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lite", "fp8", str(made), "--work-dir", str(tmp_path / "again")]) == 2
    assert "is quantised already, in compressed-tensors" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["lite", "fp8", "tiny-chat", "--work-dir", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_full_disk_is_told_and_the_run_goes_on_later(tmp_path: Path) -> None:
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    job = Job("tiny-chat", TINY_CHAT, out, Fp8())
    (tmp_path / "disk").mkdir()
    out.symlink_to(tmp_path / "disk")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # bytes of a file: as a disk that is full
    try:
        with pytest.raises(OSError, match=r"model-00001-of-00005.safetensors: cannot be written.*make room"):
            job.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob("*.partial"))
    job.run()
    assert (tmp_path / "disk" / "config.json").exists()


def _leaves(folder: Path) -> dict[str, np.ndarray]:
    model = load_model(folder, dtype="float32", dequantise=True)
    return {name: np.asarray(leaf) for name, leaf in zip(model.skeleton.specs, model.leaves, strict=True)}
