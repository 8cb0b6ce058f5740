"""Placement: every shard is fetched alone, once, within the byte budget; errors end the loading."""

from __future__ import annotations

import os
import signal
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lmdeploy_jax.converters import device
from lmdeploy_jax.converters.device import Placement, load_parallel, place
from lmdeploy_jax.converters.slicing import Index, aligned_empty

ARRAY = np.arange(16 * 6, dtype=np.float32).reshape(16, 6)


def single() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def test_shards_are_fetched_alone_and_once() -> None:
    devices = np.asarray(jax.devices())
    mesh = Mesh(devices.reshape(1, -1), ("dp", "tp"))
    fetched: list[Index] = []

    def fetch(index: Index) -> np.ndarray:
        fetched.append(index)
        return ARRAY[index]

    cut = len(devices) if 16 % len(devices) == 0 else 1
    for spec, shards in ((PartitionSpec("tp" if cut > 1 else None), cut), (PartitionSpec(), 1)):
        fetched.clear()
        sharding = NamedSharding(mesh, spec)
        array = place(ARRAY.shape, np.dtype(ml_dtypes.bfloat16), sharding, fetch)
        assert len(fetched) == shards
        assert array.sharding == sharding
        np.testing.assert_array_equal(np.asarray(array), ARRAY.astype(ml_dtypes.bfloat16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only host memory can be shared")
def test_the_cpu_takes_the_buffer_over() -> None:
    buffer = aligned_empty(ARRAY.shape, ARRAY.dtype)
    buffer[...] = ARRAY
    array = place(ARRAY.shape, ARRAY.dtype, single(), lambda _: buffer)
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data


def test_a_large_weight_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PIECE_BYTES", 100)
    asked: list[Index] = []

    class Weight:
        shape = ARRAY.shape

        def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
            asked.append(index)
            return ARRAY[index].astype(dtype)

    spec = jax.ShapeDtypeStruct(ARRAY.shape, ARRAY.dtype, sharding=single())
    found = device.load_leaves({"weight": Weight()}, {"weight": spec})
    np.testing.assert_array_equal(np.asarray(found["weight"]), ARRAY)
    assert len(asked) == ARRAY.nbytes // 100


def test_many_arrays_within_the_budget() -> None:
    lock, held, peak = threading.Lock(), 0, 0

    def fetch(index: Index) -> np.ndarray:
        nonlocal held, peak
        with lock:
            held += ARRAY.nbytes
            peak = max(peak, held)
        time.sleep(0.005)
        with lock:
            held -= ARRAY.nbytes
        return ARRAY[index]

    seen: list[tuple[int, int]] = []
    items = {str(i): Placement(ARRAY.shape, ARRAY.dtype, single(), fetch) for i in range(20)}
    arrays = load_parallel(
        items, threads=8, bytes_in_flight=2 * ARRAY.nbytes + 1, progress=lambda *at: seen.append(at)
    )
    assert list(arrays) == list(items)
    assert ARRAY.nbytes < peak <= 2 * ARRAY.nbytes
    assert seen == [(i * ARRAY.nbytes, 20 * ARRAY.nbytes) for i in range(21)]
    assert load_parallel(items, bytes_in_flight=1).keys() == items.keys()


def test_the_first_error_ends_the_loading() -> None:
    calls = []

    def fetch(index: Index) -> np.ndarray:
        calls.append(index)
        raise OSError("disk on fire")

    items = {str(i): Placement(ARRAY.shape, ARRAY.dtype, single(), fetch) for i in range(50)}
    with pytest.raises(OSError, match="disk on fire"):
        load_parallel(items, threads=1)
    assert len(calls) < 50


def test_ctrl_c_drops_what_has_not_begun() -> None:
    begun: list[int] = []
    interrupted = threading.Event()

    def on_sigint(number: int, frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def fetch(index: object) -> np.ndarray:
        begun.append(1)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGINT)  # handled by the main thread, which waits for the others
        interrupted.wait()
        time.sleep(0.001)
        return np.zeros(4, np.float32)

    items = {str(i): Placement((4,), np.dtype(np.float32), single(), fetch) for i in range(2000)}
    before = signal.signal(signal.SIGINT, on_sigint)
    try:
        with pytest.raises(KeyboardInterrupt):
            load_parallel(items)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(begun) < len(items)
