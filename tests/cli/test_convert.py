"""`convert`: the written checkpoint holds the same weights, and nothing is overwritten unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lmdeploy_jax.bench import checkpoint
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.converters.load import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make("tiny-qwen2", tmp_path_factory.mktemp("models"))


def test_converted_weights_are_the_originals(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"
    assert main(["convert", str(model), str(out)]) == 0
    assert "bfloat16" in capsys.readouterr().out
    before, after = load_model(model, dtype="bfloat16"), load_model(out, dtype="bfloat16")
    assert list(before.skeleton.specs) == list(after.skeleton.specs)
    for old, new in zip(before.leaves, after.leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
    with safe_open(model / "model-00001-of-00001.safetensors", "np") as file:  # not through our own reader
        largest = max(after.leaves, key=lambda leaf: leaf.size)
        np.testing.assert_array_equal(np.asarray(largest), file.get_tensor("model.embed_tokens.weight"))
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("out", ["file", "file/below/it"])
def test_out_is_looked_at_before_the_model(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(["convert", str(tmp_path / "no-such-model"), str(tmp_path / out)]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_the_folder_that_one_works_in_is_never_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    for out in (".", str(tmp_path.parent)):
        assert main(["convert", str(model), out, "--force"]) == 2
        assert f"{out}: would replace {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_full_folder_is_kept_unless_forced(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["convert", str(model), str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert main(["convert", str(model), str(tmp_path), "--force"]) == 0
    assert (tmp_path / "config.json").exists()


def test_what_is_left_out_of_a_model_that_takes_images_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "tiny-vision", str(tmp_path / "out")]) == 0
    assert (
        f"what encodes images is left out; {tmp_path / 'out'} will take text alone" in capsys.readouterr().err
    )
