"""Encoder attention: a block at a time gives what all scores at once give, through XLA and by the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmdeploy_jax.pallas_kernels.encoder_attention import encoder_attention, pallas, xla
from lmdeploy_jax.pallas_kernels.encoder_attention.pallas import Tuning

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
SMALL = Tuning(32, 16, 4, 2)
KERNEL = [
    # B, N, H, D, dtype, segments and their lengths (of -1: padding)
    pytest.param((2, 65, 2, 64), "float32", None, id="a class token behind whole blocks"),
    pytest.param((1, 40, 1, 8), "float32", None, id="a part of a block"),
    pytest.param((3, 16, 2, 80), "bfloat16", [(0, 10), (-1, 6)], id="windows"),
    pytest.param((1, 128, 2, 24), "float32", [(0, 60), (1, 3), (2, 34), (-1, 31)], id="views in a row"),
    pytest.param(
        (1, 96, 1, 16), "float32", [(0, 9), (-1, 40), (0, 20), (3, 20), (-1, 7)], id="padding within"
    ),
]


def drawn(shape: tuple[int, ...], dtype: str) -> jax.Array:
    batch, count, heads, size = shape
    values = np.random.default_rng(0).standard_normal((batch, count, 3, heads, size))
    return jnp.asarray(values, dtype)


def rows(batch: int, lengths: list[tuple[int, int]] | None) -> jax.Array | None:
    if lengths is None:
        return None
    numbers, counts = zip(*lengths, strict=True)
    row = np.repeat(np.array(numbers, np.int32), counts)
    return jnp.asarray(np.broadcast_to(row, (batch, len(row))))


def compared(got: jax.Array, want: jax.Array, segments: jax.Array | None, dtype: str) -> None:
    """But for padding, which is anything finite."""
    ours, theirs = (np.asarray(each, np.float32) for each in (got, want))
    counts = slice(None) if segments is None else np.asarray(segments) >= 0
    np.testing.assert_allclose(ours[counts], theirs[counts], atol=TOLERANCE[dtype])
    assert np.isfinite(ours).all()


@pytest.mark.parametrize(("shape", "dtype", "lengths"), KERNEL)
def test_the_kernel_gives_what_xla_gives(
    shape: tuple[int, ...], dtype: str, lengths: list[tuple[int, int]] | None
) -> None:
    qkv, segments = drawn(shape, dtype), rows(shape[0], lengths)
    got = pallas.encoder_attention(qkv, segments, tuning=SMALL, interpret=True)
    compared(got, xla.encoder_attention(qkv, segments), segments, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 72, 80, 128])
@pytest.mark.parametrize(
    ("count", "lengths"), [(1025, None), (64, [(0, 40), (-1, 24)]), (2048, [(0, 1000), (1, 48), (2, 1000)])]
)
def test_the_compiled_kernel_gives_what_xla_gives(
    size: int, count: int, lengths: list[tuple[int, int]] | None
) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    segments = rows(2, lengths)
    qkv = drawn((2, count, 4, size), "bfloat16")
    got = encoder_attention(qkv, segments, backend="pallas")
    compared(got, xla.encoder_attention(qkv, segments), segments, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_give_what_all_at_once_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, segments = drawn((1, 64, 2, 8), dtype), rows(1, [(0, 30), (1, 1), (2, 22), (-1, 11)])
    whole = encoder_attention(qkv, segments, backend="xla")
    monkeypatch.setattr(xla, "DENSE", 16)
    for queries in (64, 32):
        monkeypatch.setattr(xla, "QUERIES", queries)
        blocked = encoder_attention(qkv, segments, backend="xla")
        np.testing.assert_allclose(
            blocked.astype("float32"), whole.astype("float32"), atol=1e-6 if dtype == "float32" else 0.02
        )


def test_a_patch_sees_its_own_segment_alone() -> None:
    qkv, segments = drawn((1, 12, 2, 8), "float32"), rows(1, [(0, 5), (1, 7)])
    whole = encoder_attention(qkv, segments, backend="xla")
    parts = [encoder_attention(qkv[:, at], None, backend="xla") for at in (slice(0, 5), slice(5, 12))]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "pallas_interpret"])
def test_padding_behind_a_sequence_is_seen_by_nobody(backend: str) -> None:
    qkv = drawn((2, 24, 2, 8), "float32").at[:, 21:].set(50.0)
    got = encoder_attention(qkv, None, count=21, backend=backend)
    assert got.shape == (2, 24, 2, 8)
    np.testing.assert_allclose(got[:, :21], encoder_attention(qkv[:, :21], None, backend="xla"), atol=1e-5)
