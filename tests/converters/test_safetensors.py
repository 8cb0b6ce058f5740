"""Safetensors folders: slices equal NumPy's, and no damage ever ends in anything but a CheckpointError."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from lmdeploy_jax.converters import safetensors as module
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.shards import INDEX_NAME
from lmdeploy_jax.errors import CheckpointError

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "cube": RNG.standard_normal((5, 4, 6)).astype(np.float32),
    "wide": RNG.standard_normal((6, 4100)).astype(ml_dtypes.bfloat16),
    "half": RNG.standard_normal((9, 3)).astype(np.float16),
    "ids": np.arange(7, dtype=np.int64),
    "eight": RNG.standard_normal(16).astype(ml_dtypes.float8_e4m3fn),
    "scalar": np.array(3, np.float32),
    "empty": np.zeros((0, 4), np.float16),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    folder = tmp_path_factory.mktemp("single")
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    return CheckpointReader(folder)


def write(file: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(name: str, reader: CheckpointReader) -> None:
    array, info = reader.read(name), reader.info(name)
    assert (info.shape, info.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
    assert array.dtype == TENSORS[name].dtype
    assert array.ctypes.data % 64 == 0 or not array.size
    np.testing.assert_array_equal(array, TENSORS[name])
    assert set(reader.names()) == set(TENSORS)


@pytest.mark.parametrize("piece", [8, 64, 8 << 20])
def test_every_slice_of_a_cube(piece: int, reader: CheckpointReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", piece)
    cuts = [[slice(a, b) for a, b in itertools.combinations(range(0, n + 1, 2), 2)] for n in (5, 4, 6)]
    for index in itertools.product(*cuts):
        np.testing.assert_array_equal(reader.read("cube", index), TENSORS["cube"][index])
    np.testing.assert_array_equal(reader.read("cube", (slice(-2, None),)), TENSORS["cube"][-2:])


@pytest.mark.parametrize("columns", [slice(3, 20), slice(1, 4099), slice(None)])
def test_columns_and_conversion(columns: slice, reader: CheckpointReader) -> None:
    """Short runs are cut from whole rows, long runs are read alone; both into another dtype too."""
    index = (slice(1, 5), columns)
    expected = TENSORS["wide"][index]
    np.testing.assert_array_equal(reader.read("wide", index), expected)
    out = np.empty(expected.shape, np.float32)
    reader.read_into("wide", index, out)
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_a_slice_takes_no_more_memory_than_itself(tmp_path: Path) -> None:
    save_file({"w": np.zeros((4096, 1024), np.float32)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        tracemalloc.start()
        reader.read("w", (slice(0, 64),))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 1024 * 4 + 20_000


def test_threads_share_a_reader(reader: CheckpointReader) -> None:
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda i: (i % 6, reader.read("wide", (slice(i % 6, i % 6 + 1),))), range(200))
        for row, array in rows:
            np.testing.assert_array_equal(array[0], TENSORS["wide"][row])


def test_wrong_questions(reader: CheckpointReader, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        reader.read("nothing")
    with pytest.raises(ValueError, match="step"):
        reader.read("ids", (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="more dimensions"):
        reader.read("ids", (slice(0, 4), slice(0, 1)))
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    closed = CheckpointReader(tmp_path)
    closed.close()
    with pytest.raises(CheckpointError, match="closed"):
        closed.read("w")


def test_a_file_cut_while_open(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(1000)}, file)
    with CheckpointReader(tmp_path) as reader:
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="the file ends at byte"):
            reader.read("w")


# --- Folders -----------------------------------------------------------------------------------------------


def shard(folder: Path, weight_map: dict[str, str] | None) -> None:
    save_file({"a": np.zeros(2), "b": np.ones(2)}, folder / "model-1.safetensors")
    save_file({"c": np.full(2, 2.0)}, folder / "model-2.safetensors")
    if weight_map is not None:
        (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("indexed", [True, False])
def test_shards(indexed: bool, tmp_path: Path) -> None:
    files = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    shard(tmp_path, files if indexed else None)
    with CheckpointReader(tmp_path) as reader:
        assert sorted(reader.names()) == ["a", "b", "c"]
        assert reader.read("c")[0] == 2


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "x": "model-9.safetensors"}, "missing: model-9.safetensors"),
        ({"a": "model-2.safetensors", "c": "model-2.safetensors"}, "'a' is not in its shard model-2"),
        ({"a": "../x.safetensors"}, "weight_map"),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_wrong_index(weight_map: dict[str, str], message: str, tmp_path: Path) -> None:
    shard(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_the_index_decides_between_two_shards(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2), "b": np.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": np.ones(2)}, tmp_path / "model-2.safetensors")
    for file, expected in (("model-1.safetensors", 0), ("model-2.safetensors", 1)):
        weight_map = {"a": file, "b": "model-1.safetensors", "c": "model-2.safetensors"}
        save_file({"a": np.ones(2), "c": np.ones(2)}, tmp_path / "model-2.safetensors")
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        with CheckpointReader(tmp_path) as reader:
            assert reader.read("a")[0] == expected
            assert sorted(reader.names()) == ["a", "b", "c"]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"a": np.zeros(2)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is also in 1\.safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "the folder is empty"),
        ("pytorch_model.bin", "is a pickle.*refused; convert"),
        ("model.pt", "is a pickle"),
        ("model.pth", "is a pickle"),
        ("model.ckpt", "is a pickle"),
        ("model.gguf", "format that is not read"),
        ("config.json", r"no \*\.safetensors file"),
    ],
)
def test_folders_without_weights(file: str | None, message: str, tmp_path: Path) -> None:
    if file:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        CheckpointReader(tmp_path / "file")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(tmp_path)


def test_a_link_to_what_was_never_downloaded(tmp_path: Path) -> None:
    """As the hub's cache has it after a download that was ended."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "missing")
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: cannot be read: .*; download the file again"
    ):
        CheckpointReader(tmp_path)


def many_keys(count: int) -> bytes:
    """A header whose last key repeats the first: quadratic time would take hours."""
    return ("{" + ",".join(f'"{i}":0' for i in [*range(count), 0]) + "}").encode()


# --- Damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 8)}, b"1234567", "ends at byte .* truncated"),
        ({"a": entry([2], 0, 8)}, b"123456789", "1 bytes follow the last tensor"),
        ({"a": entry([3], 0, 8)}, b"12345678", r"shape \[3\] of float32 takes 12 bytes"),
        ({"a": entry([2], 8, 0)}, b"12345678", "give -8"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678", "'b' at byte .* overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"x" * 12, "'b' at byte .* follows a hole"),
        ({"a": entry([2], 0, 8, "F4")}, b"12345678", "dtype 'F4' is not one of"),
        ({"a": entry([2], 0, 8, [])}, b"12345678", "dtype"),  # type: ignore[arg-type]
        ({"a": entry([-2], 0, 8)}, b"12345678", "malformed"),
        ({"a": entry([True], 0, 4)}, b"1234", "malformed"),
        ({"a": entry([0, 1 << 60], 0, 0)}, b"", "malformed"),
        ({"a": {"dtype": "F32"}}, b"", "lacks"),
        ({"a": 3}, b"", "lacks"),
        ([], b"", "JSON list"),
        (b'{"a": 1, "a": 2}', b"", "'a' stands twice"),
        (many_keys(200_000), b"", "'0' stands twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff", b"", "not valid JSON"),
    ],
)
def test_damaged_headers(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header length 9223372036854775808"),
    ],
)
def test_files_that_are_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_found_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes of a sound file are changed, cut off or inserted: it reads as in the safetensors library, or
    CheckpointError; nothing else. The library is an oracle only: it takes a repeated key, and its errors name
    neither a tensor nor a byte.
    """
    file = tmp_path / "model.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.int8)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 4))
        content[place : place + length] = data.draw(st.binary(max_size=4))
    file.write_bytes(
        bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content
    )
    try:
        with CheckpointReader(tmp_path) as reader:
            read = {name: reader.read(name) for name in reader.names()}
    except CheckpointError:
        return
    with safe_open(file, "np") as library:  # what is accepted here, the reference accepts and reads alike
        assert set(library.keys()) == set(read)
        for name, array in read.items():
            assert library.get_tensor(name).tobytes() == array.tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3) | JSON)
def test_any_json_header_is_judged(header: Any, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", header, b"12345678")
    with contextlib.suppress(CheckpointError):
        CheckpointReader(tmp_path).close()
