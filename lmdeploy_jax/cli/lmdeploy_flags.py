"""LMDeploy's flags that have no option here: taken where they ask for nothing that is missing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from absl import flags as absl_flags

from lmdeploy_jax.cli.flags import FlagSet, UsageError, define_list
from lmdeploy_jax.config import PytorchEngineConfig, TurbomindEngineConfig

SECTION = "LMDeploy's own"
ENGINE = (
    "adapters", "async", "cache_block_seq_len", "communicator", "cp", "cudagraph_capture_batch_sizes",
    "device", "distributed_executor_backend", "dllm_block_length",
    "dllm_confidence_threshold", "dllm_denoising_steps", "dllm_unmasking_strategy", "enable_eplb",
    "enable_microbatch", "kernel_block_size", "logprobs_mode", "max_prefill_iters",
    "migration_backend", "num_tokens_per_iter", "prefix_cache_decode_state_interval",
    "prefix_cache_state_budget", "role", "rope_scaling_factor",
)  # fmt: skip
FIELDS = {"device": "device_type", "async": "async_"}  # flags that are not called as their field is
LISTS = ("adapters", "cudagraph_capture_batch_sizes")
KEY_FILE, CERTIFICATE_FILE = "SSL_KEYFILE", "SSL_CERTFILE"  # of the environment, as LMDeploy reads them
logger = logging.getLogger("lmdeploy_jax")


@dataclass(frozen=True)
class Option:
    """A flag: what it is where it is not given, which other values are fine, and what to do instead of those
    that are not; without a `remedy` every value is fine, since it only tunes LMDeploy's own engines.
    """

    default: Any
    fine: tuple[object, ...] = ()
    remedy: str | None = None

    @property
    def help(self) -> str:
        if self.remedy is None:
            return "has no meaning here"
        values = [str(value) for value in self.fine if value not in (None, False, {})]
        return f"{' or '.join(values)} alone: {self.remedy}" if values else self.remedy


_DRAFT = Option(None, (None,), "speculative decoding is not implemented.")
SPECULATION = {
    "speculative_algorithm": _DRAFT,
    "speculative_draft_model": _DRAFT,
    "speculative_num_draft_tokens": Option(1),
}


def add_lmdeploy_flags(flags: FlagSet, *, server: bool = False) -> None:
    """Define those that the command has no option for. server: those of `serve` too."""
    for name, option in _options().items():
        if name not in flags.values:
            flags.add(SECTION, *_definition(name, option), option.help)
    if server:
        about = f"HTTPS with the files that {KEY_FILE} and {CERTIFICATE_FILE} of the environment name"
        flags.add(SECTION, absl_flags.DEFINE_boolean, "ssl", False, about)


def check_lmdeploy_flags(flags: FlagSet) -> None:
    """Raises UsageError for a value that cannot be honoured; warns of one that has no meaning here."""
    for name, option in _options().items():
        if flags.values[name].present and flags.section(name) == SECTION:
            _check(name.replace("_", "-"), flags[name], option)


def _check(name: str, given: Any, option: Option) -> None:
    value = _value(given)
    if value == option.default:
        return
    if option.remedy is None:
        logger.warning("--%s %s has no meaning here and is ignored.", name, given)
    elif value not in option.fine:
        shown = " ".join(given) if isinstance(given, list) else given
        raise UsageError(f"--{name} {shown} is not supported: {option.remedy}")


def ssl_files(flags: FlagSet) -> dict[str, str]:
    """The server's options that --ssl stands for. Raises `UsageError` where there are none."""
    if not flags["ssl"] or flags["ssl_certfile"] is not None:
        return {}
    key, certificate = (os.environ.get(name) for name in (KEY_FILE, CERTIFICATE_FILE))
    if not key or not certificate:
        raise UsageError(
            f"--ssl needs {KEY_FILE} and {CERTIFICATE_FILE} in the environment; or give --ssl-keyfile and "
            "--ssl-certfile."
        )
    return {"ssl_keyfile": key, "ssl_certfile": certificate}


def _options() -> dict[str, Option]:
    return dict(_engine_options()) | SPECULATION


def _engine_options() -> Iterator[tuple[str, Option]]:
    """As the config says that has the field."""
    for name in ENGINE:
        called = FIELDS.get(name, name)
        for kind in (TurbomindEngineConfig, PytorchEngineConfig):
            if hasattr(kind, called):
                yield name, Option(getattr(kind, called), *kind.refused(called))


def _definition(name: str, option: Option) -> tuple[Any, str, Any]:
    """absl's DEFINE function for a flag, its name and default. Most are texts, which `_value` reads."""
    if name in LISTS:
        return define_list, name, option.default
    if isinstance(option.default, bool):
        return absl_flags.DEFINE_boolean, name, option.default
    return absl_flags.DEFINE_string, name, None if option.default is None else str(option.default)


def _value(given: Any) -> Any:
    """A flag's value as Python has it: "0" and "0.0" are the same number, "None" is none."""
    if not isinstance(given, str) or given.lower() == "none":
        return None if isinstance(given, str) else given
    try:
        return json.loads(given)
    except ValueError:
        return given
