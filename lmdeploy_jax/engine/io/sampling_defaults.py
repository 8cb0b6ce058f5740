"""Sampling parameters that a request or a command line leaves open: what generation_config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy_jax.errors import CheckpointError, ConfigError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.text.settings import read_object

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
STORED = (*SAMPLING, "repetition_penalty")


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request says goes first, then these, then `GenerationConfig`'s own defaults.

    do_sample: whether an answer is sampled where the request says nothing about sampling.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    do_sample: bool = True

    @classmethod
    def read(cls, choice: str, folder: Path) -> SamplingDefaults:
        """`auto`: generation_config.json in `folder`; `lmdeploy`: none; else the folder of another one.

        Raises `ConfigError` for a folder without that file, `CheckpointError` for values that cannot work.
        """
        if choice == "lmdeploy":
            return cls()
        path = (folder if choice == "auto" else Path(choice).expanduser()) / "generation_config.json"
        if choice != "auto" and not path.is_file():
            raise ConfigError(
                f"generation_config={choice!r}: there is no {path}. Give auto, lmdeploy or a folder with it."
            )
        stored = read_object(path)
        values = {name: stored[name] for name in STORED if stored.get(name) is not None}
        found = cls(values, stored.get("do_sample", True))
        try:
            found.config({})
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return found

    def config(self, given: Mapping[str, Any]) -> GenerationConfig:
        """The generation config of a request; None stands for what it leaves open. Raises `ConfigError`."""
        said = {name: value for name, value in given.items() if value is not None}
        do_sample = self.do_sample or any(name in said for name in SAMPLING)
        open_length = {"max_new_tokens": None}
        return GenerationConfig(**({"do_sample": do_sample} | open_length | dict(self.values) | said))
