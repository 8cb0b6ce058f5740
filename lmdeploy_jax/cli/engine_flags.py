"""Flags of the engine: one for each field of `JaxEngineConfig`."""

from __future__ import annotations

import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from absl import flags as absl_flags

from lmdeploy_jax.cli.flags import FlagSet, define_json, merged
from lmdeploy_jax.config import JaxEngineConfig

SECTION = "Engine"
ALIASES = {"turbomind": "pallas", "pytorch": "xla"}  # LMDeploy's engine names

POLICIES = {"none": 0, "int4": 4, "int8": 8, "fp8": 16, "fp8_e4m3": 16, "fp8_e5m2": 17, "turbo_quant": 42}
"""LMDeploy's names of its numbers."""

HELP = {
    "dtype": "type of weights and computation; auto takes the checkpoint's on a GPU and float32 on a CPU",
    "tp": "number of devices that share the model (tensor parallelism)",
    "dp": "copies of the model, each on tp devices and in a process of its own (data parallelism)",
    "ep": "parts that a mixture's experts are dealt out in over the tp devices (expert parallelism)",
    "nnodes": "hosts that the tp devices lie on, tp / nnodes on each; start the command on every one",
    "node_rank": "which of the hosts this is; 0 takes the requests, the others follow it",
    "dist_init_addr": "HOST:PORT of node 0, the same on every host",
    "session_len": "longest context in tokens, prompt and answer together; without it the model's own",
    "max_batch_size": "most requests in one step; without it chosen by device",
    "cache_max_entry_count": "memory of the KV cache: a share of what is free if below 1, else bytes",
    "enable_prefix_caching": "reuse the KV cache of prompts that begin alike",
    "max_prefill_token_num": "most prompt tokens in one step; without it chosen by device",
    "decode_steps": "steps at once while no request waits; without it 4 for small models on GPUs, else 1",
    "eager_mode": "compile each program when a step first needs it instead of all at the start",
    "language_model_only": "leave out what encodes images, and take none",
    "trust_remote_code": "run the checkpoint's own Python code where its tokenizer needs it",
    "quant_policy": "how the KV cache is quantised, as LMDeploy's names or numbers have it; int8 is safe",
    "enable_return_routed_experts": "let requests ask which experts each of their tokens had",
    "vision_max_batch_size": "images that are encoded together at most; by default as many as fit",
    "backend": "kernels; auto picks by device, turbomind and pytorch are aliases of pallas and xla",
    "model_format": "how the checkpoint is quantised, where no file says so; fp8 quantises a 16-bit one",
    "revision": "branch, tag or commit on the Hugging Face hub",
    "download_dir": "folder for downloads from the hub",
    "hf_overrides": "JSON merged over the checkpoint's config.json; --hf-overrides.a.b v sets one entry",
    "compile_cache_dir": "folder of compiled programs; without it the user's cache folder, empty is off",
}


def add_engine_flags(flags: FlagSet, defaults: dict[str, Any] | None = None) -> None:
    """Define one flag a field; `defaults` replaces the field's own default for one command."""
    hints = get_type_hints(JaxEngineConfig)
    for field in fields(JaxEngineConfig):
        default = (defaults or {}).get(field.name, field.default)
        default = str(default) if field.name == "quant_policy" else default
        define, rest = _definition(field.name, hints[field.name])
        flags.add(SECTION, define, field.name, default, HELP.get(field.name, ""), **rest)


def engine_config(flags: FlagSet) -> JaxEngineConfig:
    """The engine's configuration as the flags say. Raises `ConfigError`."""
    values = {field.name: flags[field.name] for field in fields(JaxEngineConfig)}
    values["backend"] = ALIASES.get(values["backend"], values["backend"])
    policy = values["quant_policy"]
    values["quant_policy"] = POLICIES[policy] if policy in POLICIES else int(policy)
    values["hf_overrides"] = merged(values["hf_overrides"])
    return JaxEngineConfig(**values)


def _definition(name: str, hint: Any) -> tuple[Any, dict[str, Any]]:
    """absl's DEFINE function for a field's type, and its further arguments."""
    kind = _without_none(hint)
    if name == "quant_policy":
        numbers = map(str, sorted(set(POLICIES.values())))
        return absl_flags.DEFINE_enum, {"enum_values": [*POLICIES, *numbers]}
    if get_origin(kind) is Literal:
        extra = list(ALIASES) if name == "backend" else []
        return absl_flags.DEFINE_enum, {"enum_values": [*get_args(kind), *extra]}
    simple = {bool: absl_flags.DEFINE_boolean, int: absl_flags.DEFINE_integer, float: absl_flags.DEFINE_float}
    if kind in simple:
        return simple[kind], {}
    if get_origin(kind) is dict:
        return define_json, {}
    if kind is str:
        return absl_flags.DEFINE_string, {}
    raise TypeError(f"JaxEngineConfig.{name} has type {hint}, which the command line cannot offer.")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [arg for arg in get_args(hint) if arg is not types.NoneType]
        return str if str in kinds else kinds[0]  # a path is a text on the command line
    return hint
