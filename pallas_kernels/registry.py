"""Which implementation serves the ops on a device, and why the hand-written kernels do not."""

from __future__ import annotations

import importlib.util

BACKENDS = ("xla", "pallas", "pallas_interpret")
"""What the ops take as `backend`; `pallas_interpret` runs the Pallas kernels anywhere, slowly, for tests."""

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256
MAX_GROUP = 16
MAX_LATENT_RANK, MAX_LATENT_ROTATED = 512, 128
MIN_COMPUTE_CAPABILITY = 8.0


def check_backend(backend: str, *more: str) -> None:
    """Raises ValueError unless `backend` names an implementation; `more` are those that only one op has."""
    if backend not in (*BACKENDS, *more):
        known = ", ".join((*BACKENDS, *more))
        raise ValueError(f"kernel backend {backend!r} is unknown; choose one of {known}")


def why_not(
    platform: str,
    head_dim: int | None = None,
    *,
    dtype: str = "bfloat16",
    group: int = 1,
    compute_capability: float | None = None,
) -> str | None:
    """Why the Pallas kernels cannot serve, or None if they can.

    `platform` as `jax.Device.platform` has it; `group` is query heads a KV head; `compute_capability` as
    `jax.Device.compute_capability` has it (None: not checked), and head_dim None leaves the model out.
    """
    if platform not in ("gpu", "cuda"):
        return f"Pallas kernels need an NVIDIA GPU; the platform is {platform}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this version of JAX has no Triton backend for Pallas"
    if compute_capability is not None and compute_capability < MIN_COMPUTE_CAPABILITY:
        return f"compute capability {compute_capability} is below {MIN_COMPUTE_CAPABILITY} (Ampere)"
    if dtype not in DTYPES:
        return f"a KV cache of {dtype} is none of {', '.join(DTYPES)}"
    return why_not_heads(head_dim, group)


def why_not_latents(rank: int, rotated: int) -> str | None:
    """Why the Pallas kernels cannot do attention over latents of `rank` columns and others that rotate."""
    if not 1 <= rank <= MAX_LATENT_RANK or not 1 <= rotated <= MAX_LATENT_ROTATED:
        return (
            f"latents of {rank} + {rotated} columns are beyond {MAX_LATENT_RANK} + {MAX_LATENT_ROTATED}, "
            "what a program's registers hold"
        )
    return None


def why_not_heads(head_dim: int | None, group: int) -> str | None:
    """Why the Pallas kernels cannot do attention with `group` query heads a KV head, or None if they can."""
    if head_dim is not None and not 16 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim} is outside 16 to {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads a KV head are more than {MAX_GROUP}"
    return None
