"""The engine's configuration: LMDeploy's field names, checked when they are set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmdeploy_jax.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
BACKENDS = ("auto", "pallas", "xla")
PAGE_SIZE = 64  # tokens a page; the kernels are written for it


@dataclass
class JaxEngineConfig:
    """How a model is loaded and run. Raises `ConfigError` for a value that cannot work.

    cache_max_entry_count: share of the free memory given to the KV cache if < 1, else an absolute number of bytes.
    max_batch_size, max_prefill_token_num, session_len: None lets the engine choose by device and model.
    hf_overrides: nested dict merged over the checkpoint's config.json.
    compile_cache_dir: where compiled programs are kept between runs; None is the user's cache folder, "" is off.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    cache_block_seq_len: int = PAGE_SIZE
    enable_prefix_caching: bool = True
    max_prefill_token_num: int | None = None
    backend: Literal["auto", "pallas", "xla"] = "auto"
    revision: str | None = None
    download_dir: str | None = None
    hf_overrides: dict[str, Any] | None = None
    compile_cache_dir: str | None = None

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("backend", self.backend, BACKENDS)
        _positive("tp", self.tp)
        for name in ("session_len", "max_batch_size", "max_prefill_token_num"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.cache_block_seq_len != PAGE_SIZE:
            raise ConfigError(
                f"cache_block_seq_len={self.cache_block_seq_len!r} is not supported: pages hold {PAGE_SIZE} tokens. "
                "Leave the field out."
            )
        share = self.cache_max_entry_count
        if not isinstance(share, int | float) or isinstance(share, bool) or not share > 0:
            raise ConfigError(
                f"cache_max_entry_count={share!r} is invalid: give a share of the free memory in (0, 1) "
                "or a number of bytes >= 1."
            )


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is invalid: it must be one of {', '.join(allowed)}.")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} is invalid: it must be a positive integer.")
