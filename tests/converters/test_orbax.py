"""Converted checkpoints: what is saved comes back exactly; anything else is a CheckpointError."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.errors import CheckpointError

ARRAYS = {
    "layers.0.qkv.weight": np.arange(2 * 4 * 3 * 8).reshape(2, 4, 3, 8).astype(jnp.bfloat16),
    "norm.weight": np.linspace(0, 1, 8).astype(np.float32),
    "zero.bias": np.zeros(8, np.float32),
}


def specs(dtype: str | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=where)
        for name, array in ARRAYS.items()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "modeling.py").write_text("code")
    return folder


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "out"
    return orbax.save(out, {n: jnp.asarray(a) for n, a in ARRAYS.items()}, {"dtype": "bfloat16"}, model)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_round_trip(saved: Path, model: Path) -> None:
    loaded = orbax.load(saved, specs())
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(loaded[name]), array)
    assert orbax.is_converted(saved)
    assert not orbax.is_converted(model)
    assert orbax.read_manifest(saved)["meta"] == {"dtype": "bfloat16"}


def test_only_small_data_files_are_copied(saved: Path) -> None:
    expected = {"config.json", "tokenizer.json", "chat_template.jinja", "weights", orbax.MANIFEST}
    assert {entry.name for entry in saved.iterdir()} == expected
    assert [entry.name for entry in saved.parent.iterdir()] == ["out"]


def test_compressed_arrays_load_through_orbax(copy: Path) -> None:
    shutil.rmtree(copy / "weights")
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:  # compressed, so not mappable
        checkpointer.save(copy / "weights", {n: jnp.asarray(a) for n, a in ARRAYS.items()})
    loaded = orbax.load(copy, specs())
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), array)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only host memory can be mapped")
def test_mapped_weights_are_plain_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "_restore", None)
    assert orbax.load(saved, specs()).keys() == ARRAYS.keys()
    chunk = saved / "weights" / "layers.0.qkv.weight" / "0.0.0.0"
    assert chunk.read_bytes() == ARRAYS["layers.0.qkv.weight"].tobytes()


def test_loads_as_another_dtype(saved: Path) -> None:
    loaded = orbax.load(saved, specs("float32"))
    name = "layers.0.qkv.weight"
    assert loaded[name].dtype == np.float32
    np.testing.assert_array_equal(np.asarray(loaded[name]), ARRAYS[name].astype(np.float32))


def test_a_folder_in_use_is_kept_unless_forced(copy: Path, model: Path) -> None:
    leaves = {"norm.weight": jnp.ones(8)}
    with pytest.raises(CheckpointError, match="is not empty"):
        orbax.save(copy, leaves, {}, model)
    orbax.load(copy, specs())
    orbax.save(copy, leaves, {}, model, force=True)
    assert list(orbax.read_manifest(copy)["leaves"]) == ["norm.weight"]
    with pytest.raises(CheckpointError, match="holds the checkpoint"):
        orbax.save(model.parent, leaves, {}, model, force=True)


def test_an_empty_folder_that_one_works_in_is_filled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    orbax.save(".", {"norm.weight": jnp.ones(8)}, {}, model)
    assert orbax.is_converted(tmp_path)


def test_a_link_to_another_disk_stays_one(model: Path, tmp_path: Path) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.symlink_to(disk)
    for force in (False, True):
        orbax.save(out, {"norm.weight": jnp.ones(8)}, {}, model, force=force)
        assert out.is_symlink()
        assert list(orbax.read_manifest(disk)["leaves"]) == ["norm.weight"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not list(disk.glob(".*"))


def test_a_failed_save_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        orbax.save(tmp_path / "out", {"norm.weight": jnp.ones(8)}, {"no json": object()}, model)
    assert list(tmp_path.iterdir()) == []


def largest_chunk(weight: Path) -> Path:
    return max((f for f in weight.iterdir() if f.name != ".zarray"), key=lambda f: f.stat().st_size)


# Orbax reads all weights at once; when two reads fail, the second error is nobody's.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_refused(copy: Path) -> None:
    file = largest_chunk(copy / "weights" / "layers.0.qkv.weight")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged"):
        orbax.load(copy, specs())
    file.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        orbax.load(copy, specs())
    shutil.rmtree(copy / "weights")
    with pytest.raises(CheckpointError, match="damaged"):
        orbax.load(copy, specs())


def test_a_wrong_manifest_is_refused(copy: Path) -> None:
    path = copy / orbax.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        orbax.load(copy, specs())
    for leaf in (
        {"shape": 3, "dtype": "float32"},
        {"shape": [-1], "dtype": "float32"},
        {"shape": [8], "dtype": "x"},
    ):
        path.write_text(json.dumps(manifest | {"leaves": {"norm.weight": leaf}}))
        with pytest.raises(CheckpointError, match="malformed"):
            orbax.load(copy, specs())
    for text in ("", "[]", "{}", '{"format_version": 1, "leaves": [], "config_sha256": ""}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match="convert"):
            orbax.load(copy, specs())


def test_an_edited_config_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        orbax.load(copy, specs())


def test_other_weights_are_all_named(saved: Path) -> None:
    wanted = specs()
    wanted["norm.weight"] = jax.ShapeDtypeStruct((9,), np.float32)
    wanted["head.weight"] = jax.ShapeDtypeStruct((9,), np.float32)
    del wanted["layers.0.qkv.weight"], wanted["zero.bias"]
    with pytest.raises(CheckpointError) as caught:
        orbax.load(saved, wanted)
    for part in (
        "extra weight layers.0.qkv",
        "missing weight head",
        "norm.weight: stored as [8], wanted [9]",
    ):
        assert part in str(caught.value)
