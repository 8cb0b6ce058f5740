"""Text to calibrate on: a user's file, the package's own, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cli.main import main
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.lite.texts import Texts
from lmdeploy_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(TINY_CHAT)


def test_windows_are_drawn_from_a_file(texts: Texts, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten " * 20)
    windows = texts.of_file(file, 5, 16)
    assert windows.shape == (5, 16)
    np.testing.assert_array_equal(windows, texts.of_file(file, 5, 16))
    ids = Tokenizer(TINY_CHAT).encode(file.read_text(), add_bos=False)
    assert all(any(ids[i : i + 16] == window for i in range(len(ids))) for window in windows.tolist())


def test_lines_are_texts_or_conversations(texts: Texts, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    lines = [{"text": "a b c\u2028"}, {"messages": messages}]  # a separator of lines, which JSON lets stand
    text = "\r\n\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_bytes(f"\ufeff{text}\n".encode())  # the byte order mark of Windows
    told = Tokenizer(TINY_CHAT).decode(
        texts.of_file(file, 8, 8).reshape(-1).tolist(), skip_special_tokens=False
    )
    assert "<|im_start|>" in told
    assert "Good" in told
    assert "a b c" in told


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("short.txt", "a b c", r"has \d+ tokens, fewer than a sample's 64.*--calib-seqlen of at most \d+"),
        ("empty.txt", "", "has 0 tokens, fewer than a sample's 64; give more text$"),
        ("bad.jsonl", '{"text": "a"}\n{"txt": 1}', "line 2 has neither a text 'text' nor a list 'messages'"),
        ("bad.jsonl", "{", "line 1 is no JSON"),
        ("bad.jsonl", '{"messages": [{"role": "usr", "content": "a"}]}', "bad.jsonl: line 1: .*role 'usr'"),
        ("none.txt", None, "none.txt: cannot be read"),
    ],
)
def test_files_that_do_not_do(
    texts: Texts, tmp_path: Path, name: str, content: str | None, fault: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=fault):
        texts.of_file(tmp_path / name, 2, 64)


def test_the_embedded_models_get_their_own_tasks_and_others_prose_as_well(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY_CHAT, other, ignore=shutil.ignore_patterns("*.safetensors"))
    for folder in (TINY_CHAT, other):
        windows = Texts(folder).built_in(5, 64)
        assert windows.shape == (5, 64)
        tokenizer = Tokenizer(folder)
        talks = [
            "<|im_start|>" in tokenizer.decode(ids, skip_special_tokens=False) for ids in windows.tolist()
        ]
        assert talks == [True] * 5 if folder == TINY_CHAT else [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["auto_awq", "--calib-dataset", "wikitext2"], "--calib-dataset wikitext2: no file of that name"),
        (["auto_awq", "--w-bits", "3"], "--w-bits 3 is not supported"),
        (["auto_awq", "--w-group-size", "96"], "--w-group-size 96 does not divide the 256 inputs"),
        (["auto_gptq", "--device", "cuda"], "JAX sees no GPU"),
        (["auto_gptq", "--calib-data", "/no/such/file"], "/no/such/file: cannot be read"),
        (["smooth_quant", "--quant-dtype", "float8_e5m2"], "--layout smooth_quant"),
        (["calibrate", "--calib-samples", "0"], "give at least 1"),
    ],
)
def test_flags_that_cannot_be_honoured(
    flags: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "--calib-samples" in flags else ["--calib-samples", "1", "--calib-seqlen", "16"]
    assert main(["lite", *flags, "tiny-chat", "--work-dir", str(tmp_path / "out"), *small]) == 2
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
