"""Flags of sampling, laid over what the checkpoint's generation_config.json says."""

from __future__ import annotations

from pathlib import Path

from absl import flags as absl_flags

from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.engine.io.sampling_defaults import STORED, SamplingDefaults
from lmdeploy_jax.messages import GenerationConfig

SECTION = "Generation"
MAX_NEW_TOKENS = 4096


def add_generation_flags(flags: FlagSet) -> None:
    """Define the flags. None stands for the checkpoint's own value."""
    number, real = absl_flags.DEFINE_integer, absl_flags.DEFINE_float
    add = flags.add
    add(SECTION, number, "max_new_tokens", MAX_NEW_TOKENS, "most tokens of an answer, within the context")
    add(SECTION, real, "temperature", None, "softness of sampling in [0, 2]; 0 is greedy")
    add(SECTION, real, "top_p", None, "sample from the likeliest tokens that hold this share of probability")
    add(SECTION, number, "top_k", None, "sample from this many likeliest tokens; 0 is off")
    add(SECTION, real, "min_p", None, "leave out tokens below this share of the likeliest one's probability")
    add(SECTION, real, "repetition_penalty", None, "above 1 discourages what was said before")
    add(SECTION, number, "random_seed", None, "makes sampling repeatable")


def generation_config(flags: FlagSet, folder: Path | None = None) -> GenerationConfig:
    """The flags over the generation_config.json of `folder`. Raises `ConfigError`, `CheckpointError`.

    As in LMDeploy's chat, sampling is on where neither says otherwise.
    """
    defaults = SamplingDefaults.read("auto", folder) if folder else SamplingDefaults()
    return defaults.config({name: flags[name] for name in (*STORED, "max_new_tokens", "random_seed")})
