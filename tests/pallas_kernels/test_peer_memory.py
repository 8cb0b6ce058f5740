"""What devices store for each other: the kernels' arithmetic with made-up peers, and where shares lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels import peer_memory
from lmdeploy_jax.pallas_kernels.all_gather import all_gather
from lmdeploy_jax.pallas_kernels.all_gather import pallas as gathering
from lmdeploy_jax.pallas_kernels.all_reduce_norm import (
    all_reduce_add_rms_norm,
    pallas,
    why_not,
)
from lmdeploy_jax.pallas_kernels.norm import xla
from lmdeploy_jax.pallas_kernels.workspace import HEADER_BYTES, OWN, Workspace

SHARES = (2.0, 1.0, -1.0)  # of each rank, times this device's, which is rank 1


@pytest.fixture
def peers(monkeypatch):
    """A table; what is polled are the shares of SHARES, by rank, once all have been stored."""
    stored = []

    def push(data, peer, offset, number):
        stored.append(data)
        return number

    def poll(dtype, own, offset, number):
        polled.append(len(stored))
        return (stored[-1] * SHARES[(len(polled) - 1) % len(SHARES)]).astype(dtype)

    polled = []
    monkeypatch.setattr(peer_memory, "read_number", lambda own, row, like, pack: jnp.ones_like(like))
    for name in ("clear", "count"):
        monkeypatch.setattr(peer_memory, name, lambda *args: args[-2])  # `last`
    monkeypatch.setattr(peer_memory, "push", push)
    monkeypatch.setattr(peer_memory, "poll", poll)
    yield jnp.zeros((1, OWN + 2 * len(SHARES)), jnp.int32).at[0, 0].set(SHARES.index(1.0))
    assert set(polled) == {len(SHARES)}


def test_every_device_s_share_is_added_and_normed(peers):
    rows, size, splits = 3, 320, 2
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, size), jnp.bfloat16)
    parts = jax.random.randint(keys[1], (splits, rows, size), -8, 8).astype(jnp.float32)  # sums are exact
    weight = jax.random.normal(keys[2], (size,), jnp.bfloat16)
    how = {"eps": 1e-5, "offset": 0.0}
    total = parts.sum(0) * sum(SHARES)
    want = xla.add_rms_norm(x, total, weight, **how)
    got = pallas.all_reduce_add_rms_norm(x, parts, weight, peers, **how, interpret=True)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got[1], want[1])), rtol=1e-2)


def test_rows_of_all_devices_stand_by_rank(peers):
    rows = jnp.arange(10, dtype=jnp.int32).reshape(5, 2)
    found = gathering.all_gather(rows, peers, Workspace.of(peers.shape[1], 256, "bfloat16"), interpret=True)
    np.testing.assert_array_equal(found, [rows * int(4 * share) // 4 for share in SHARES])


def test_more_words_than_are_moved_at_once_are_refused():
    workspace, table = Workspace(devices=2, row_bytes=512, rows=4), jnp.zeros((1, 7), jnp.int32)
    for shape in ((4, 5), (5, 4), (4, 3)):
        with pytest.raises(ValueError, match="not up to 4 of 1, 2 or 4 words"):
            all_gather(jnp.zeros(shape, jnp.int32), table, workspace, axis="tp", backend="xla")


def test_no_two_rows_share_a_place():
    workspace = Workspace(devices=3, row_bytes=512, rows=4)
    places = [
        int(workspace.row(jnp.int32(number), sender, jnp.int32(row)))
        for number in (6, 7)
        for sender in range(3)
        for row in range(4)
    ]
    assert sorted(places) == list(range(HEADER_BYTES, workspace.nbytes, 512))
    assert int(workspace.row(jnp.int32(8), 0, jnp.int32(0))) == places[0]


def test_what_the_kernel_cannot_do_is_refused():
    assert why_not(256, 4096, "bfloat16") is None
    assert "257 rows" in why_not(257, 4096, "bfloat16")
    assert "elements" in why_not(1, 128, "bfloat16")
    assert "elements" in why_not(1, 516, "bfloat16")
    x = jnp.zeros((1, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="128 elements"):
        all_reduce_add_rms_norm(
            x, x, x[0], jnp.zeros((1, 7), jnp.int32), axis="tp", eps=1e-5, backend="pallas"
        )
