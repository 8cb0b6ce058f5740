"""Programs that an engine finds on disk do what fresh ones do, and are found only where they fit."""

import errno
import logging
import os
import re
from pathlib import Path

import jax
import pytest

from lmdeploy_jax.cache import kv
from lmdeploy_jax.engine.core import program_cache
from lmdeploy_jax.engine.core.compile import CompileCounter
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.engine.core.program_cache import ProgramCache
from tests.engine.harness import Collector, config, submit

PROMPTS = ([5, 6, 7], [8] * 70, [9])
BESIDE = 1  # a program that JAX's own cache keeps: the KV cache's zeros
SETTINGS = {"eager_mode": False, "max_prefill_token_num": 64}


def answers(model: Path, folder: object, **changes: object) -> tuple[list[list[int]], int]:
    """Greedy and sampled answers of an engine, and how many programs its life compiled."""
    kv._zeros.cache_clear()  # an engine before this one may have had a cache of the same shape
    counter = CompileCounter()
    engine = Engine(model, config(folder, **(SETTINGS | changes)))
    try:
        collectors = [Collector() for _ in range(2 * len(PROMPTS))]
        for i, collector in enumerate(collectors):
            sampling = {} if i < len(PROMPTS) else {"temperature": 1.0, "seed": i, "logprobs": 2}
            submit(engine, PROMPTS[i % len(PROMPTS)], collector, max_new_tokens=8, **sampling)
        return [collector.wait()[0].tokens for collector in collectors], counter.count - BESIDE
    finally:
        engine.close()


@pytest.fixture(scope="module")
def first(llama, tmp_path_factory):
    """A folder that one engine has filled, and what that engine said."""
    folder = tmp_path_factory.mktemp("programs")
    said, compiled = answers(llama, folder)
    assert compiled >= 10
    return folder, said


def test_a_second_start_compiles_nothing_and_answers_alike(llama, first, capsys):
    folder, said = first
    assert answers(llama, folder) == (said, 0)
    loading, reading, ready = capsys.readouterr().err.splitlines()
    assert loading.startswith("loading ")
    assert int(reading.removeprefix("reading ").removesuffix(" programs")) >= 10
    assert re.fullmatch(r"ready in [\d.]+ s, room for [\d,]+ tokens of context", ready)


@pytest.mark.parametrize("damage", [b"", b"no pickle", None], ids=["empty", "foreign", "cut"])
def test_damaged_programs_are_compiled_again(llama, first, damage, caplog, capsys):
    folder, said = first
    victim = next((folder / "programs").glob("*/decode-1"))
    victim.write_bytes(victim.read_bytes()[:-100] if damage is None else damage)
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        assert answers(llama, folder) == (said, 1)
    assert str(victim) in caplog.text
    assert "\ncompiling 1 programs\n" in capsys.readouterr().err
    assert answers(llama, folder) == (said, 0), "it was not kept again"


def test_other_shapes_are_other_programs(llama, first):
    folder, _ = first
    _, compiled = answers(llama, folder, session_len=256)
    assert compiled >= 10


def test_without_a_folder_nothing_is_kept(tmp_path):
    cache = ProgramCache(None, jax.devices()[:1])
    cache.store(("f", 1), jax.jit(lambda x: x + 1).lower(1.0).compile())
    assert cache.load(("f", 1)) is None


def test_code_and_versions_are_part_of_a_programs_name(tmp_path, monkeypatch):
    def kept() -> bool:
        return ProgramCache(tmp_path, jax.devices()[:1], "model").load(("f", 1)) is not None

    cache = ProgramCache(tmp_path, jax.devices()[:1], "model")
    cache.store(("f", 1), jax.jit(lambda x: x + 1).lower(1.0).compile())
    assert kept()
    assert ProgramCache(tmp_path, jax.devices()[:1], "other").load(("f", 1)) is None
    with monkeypatch.context() as patch:
        patch.setattr(program_cache, "version", lambda package: "0")
        assert not kept()
    with monkeypatch.context() as patch:
        patch.setattr(program_cache, "CODE", ("models",))
        assert not kept()
    assert kept()


def test_old_folders_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "MOST_FOLDERS", 2)
    program = jax.jit(lambda x: x + 1).lower(1.0).compile()
    for i in range(4):
        ProgramCache(tmp_path, jax.devices()[:1], i).store(("f", 1), program)
    assert len(list(tmp_path.iterdir())) == 2
    assert ProgramCache(tmp_path, jax.devices()[:1], 3).load(("f", 1)) is not None


def test_a_disk_that_cannot_be_written_costs_only_the_next_start(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = ProgramCache(tmp_path / "file", jax.devices()[:1])
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        cache.store(("f", 1), jax.jit(lambda x: x + 1).lower(1.0).compile())
    assert "not kept" in caplog.text


@pytest.fixture
def compiled():
    return jax.jit(lambda x: x + 1).lower(1.0).compile()


def test_a_full_disk_leaves_no_torn_file(tmp_path, compiled, monkeypatch, caplog):
    def full(content, file):
        file.write(b"as much as fits")
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ProgramCache(tmp_path, jax.devices(), "model")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        patch.setattr(program_cache.pickle, "dump", full)
        cache.store(("decode", 1), compiled)
        cache.store(("decode", 2), compiled)
    assert [r.getMessage() for r in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "No space left" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_programs_are_kept_beside_other_engines(tmp_path, compiled, monkeypatch, caplog):
    """Another thread makes the folder meanwhile, another engine drops one."""
    cache = ProgramCache(tmp_path, jax.devices(), "model")
    cache.store(("decode", 1), compiled)
    (tmp_path / "dropped").symlink_to(tmp_path / "nowhere")
    first = iter([False])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", lambda path: next(first, True))
        cache.store(("decode", 2), compiled)
    assert not caplog.records
    assert cache.holds(("decode", 2))


def test_what_a_killed_process_left_is_swept(tmp_path, compiled):
    ProgramCache(tmp_path, jax.devices(), "model").store(("decode", 1), compiled)
    (folder,) = tmp_path.iterdir()
    old, fresh = folder / "tmp_old", folder / "tmp_fresh"  # another process may be writing the fresh one
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = ProgramCache(tmp_path, jax.devices(), "model")
    assert sorted(path.name for path in folder.iterdir()) == ["decode-1", "tmp_fresh"]
    assert cache.holds(("decode", 1))
    assert not cache.holds(("decode", 2))


def test_a_filled_folder_that_is_read_only_is_read(tmp_path, monkeypatch):
    """As part of a container's image, or somebody else's."""
    ProgramCache(tmp_path, jax.devices()[:1]).store(("f", 1), jax.jit(lambda x: x + 1).lower(1.0).compile())

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert ProgramCache(tmp_path, jax.devices()[:1]).load(("f", 1)) is not None
