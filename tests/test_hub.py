"""Names of models: which folder they mean, and that only hub ids ever reach the network."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.hub import resolve_model
from lmdeploy_jax.text.tokenizer import Tokenizer

FILES = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.model",
    "chat_template.jinja",
    "merges.txt",
]
REFUSED = ["pytorch_model.bin", "modeling_x.py", "model.pt", "model.gguf", "flax_model.msgpack"]


class Hub:
    """Stands for the hub; records what it is asked for."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def install(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> Hub:
    hub = Hub(answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, "/unused")
    assert resolve_model(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model(tmp_path.name) == Path(tmp_path.name)
    assert not hub.calls


def test_the_embedded_model_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, "/unused")
    assert resolve_model("tiny-chat") == TINY_CHAT
    assert not hub.calls


def test_a_hub_id_is_downloaded_without_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = install(monkeypatch, str(tmp_path))
    assert resolve_model("Qwen/Qwen3-0.6B", revision="v1", download_dir=tmp_path / "cache") == tmp_path
    (repo, options), *_ = hub.calls
    assert (repo, options["revision"]) == ("Qwen/Qwen3-0.6B", "v1")
    assert options["cache_dir"] == str(tmp_path / "cache")
    patterns = options["allow_patterns"]
    assert all(any(fnmatch.fnmatch(f, p) for p in patterns) for f in FILES)
    assert not any(fnmatch.fnmatch(f, p) for f in REFUSED for p in patterns)


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/model", "../x", "~/missing", "a/b/c", "", ".", "a b", "-x"]
)
def test_paths_never_reach_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, "/unused")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")  # whatever lies around the folder that the tests are run in
    if name == ".":
        assert resolve_model(name) == Path(".")
    else:
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_model(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(tmp_path / "missing")
    assert not hub.calls


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="give the folder"):
        resolve_model(file)


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), LocalEntryNotFoundError("not cached")])
def test_offline_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, error)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*give the path"):
        resolve_model("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tinychat", "Did you mean 'tiny-chat'?"),
        ("Tiny_Chat", "Did you mean 'tiny-chat'?"),
        ("qwen/qwen3-0.6b", "Did you mean 'Qwen/Qwen3-0.6B'?"),
        ("Qwen3-0.6B", "Did you mean 'Qwen/Qwen3-0.6B'?"),
        ("another/model", None),
    ],
)
def test_a_typo_is_told_from_what_is_here(
    name: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, LocalEntryNotFoundError("not cached"))
    (tmp_path / "models--Qwen--Qwen3-0.6B").mkdir()
    (tmp_path / "datasets--tiny--chats").mkdir()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name, download_dir=tmp_path)
    if meant is None:
        assert "Did you mean" not in str(caught.value)
    else:
        assert str(caught.value).endswith(meant)


def test_a_revision_that_is_not_here_is_no_typo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, LocalEntryNotFoundError("not cached"))
    (tmp_path / "models--Qwen--Qwen3-0.6B").mkdir()
    with pytest.raises(CheckpointError, match="not in the local cache at revision 'v2', and") as caught:
        resolve_model("Qwen/Qwen3-0.6B", revision="v2", download_dir=tmp_path)
    assert "Did you mean" not in str(caught.value)


def test_other_failures_keep_their_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OSError("disk full"))
    with pytest.raises(CheckpointError, match="OSError: disk full"):
        resolve_model("Qwen/Qwen3-0.6B")


def test_a_tokenizer_has_its_model_by_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, str(TINY_CHAT))
    ids = Tokenizer(TINY_CHAT).encode("hello")
    assert Tokenizer("tiny-chat").encode("hello") == ids
    assert not hub.calls
    assert Tokenizer("someone/model").encode("hello") == ids
    ((repo, options),) = hub.calls
    assert repo == "someone/model"
    kept = [name for name in FILES if any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])]
    assert kept == [name for name in FILES if not name.endswith(".safetensors")]


def test_a_tokenizer_that_is_nowhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OfflineModeIsEnabled("offline"))
    with pytest.raises(CheckpointError, match="Did you mean 'tiny-chat'"):
        Tokenizer("tinychat")
