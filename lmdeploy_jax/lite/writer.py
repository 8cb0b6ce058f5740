"""The checkpoint that is written: a shard a layer, each put in its place when it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.headers import read_header
from lmdeploy_jax.errors import CheckpointError, ConfigError
from lmdeploy_jax.lite.layouts import Tensors

JOB = "lite_job.json"  # what is written, and the notes of its shards, until the checkpoint is whole
REPORT = "lite_report.json"


def save(file: Path, tensors: Tensors) -> None:
    """Writes a file of safetensors, whole or not at all. Raises OSError, which names it."""
    partial = file.with_suffix(".partial")
    whole = {name: np.require(array, requirements="C") for name, array in tensors.items()}
    try:
        save_file(whole, partial, {"format": "pt"})
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written: {error}; make room, and give the command again") from error
    partial.replace(file)


class Writer:
    """A folder `out` in which `shards` files come to be. A folder with the unfinished work of the same `job`
    is gone on with.

    Raises ConfigError where there is something else, unless `force` allows to remove it.
    """

    def __init__(self, out: Path, source: Path, job: Mapping[str, Any], shards: int, *, force: bool) -> None:
        self.out, self.source, self.job, self._shards = out, source, job, shards
        try:
            orbax.check_apart(out, source)
            found = self._found()
            self._notes: dict[str, Any] = found.get("notes", {})
            if found.get("job") != job:
                self._begin(force)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error

    def _found(self) -> Any:
        file = self.out / JOB
        return json.loads(file.read_text()) if file.is_file() else {}

    def _begin(self, force: bool) -> None:
        if (self.out / JOB).is_file() and not force:
            raise ConfigError(
                f"{self.out}: holds what another run, with other settings or another model, has left "
                "unfinished; repeat that one, name a new folder, or replace it (--force)"
            )
        orbax.check_target(self.out, force=force)
        self.out.mkdir(parents=True, exist_ok=True)
        orbax.clear(self.out)
        self._notes = {}
        self._write_job()

    def _write_job(self) -> None:
        partial = self.out / f"{JOB}.partial"
        partial.write_text(json.dumps({"job": self.job, "notes": self._notes}))
        partial.replace(self.out / JOB)

    def file(self, shard: int) -> Path:
        return self.out / f"model-{shard + 1:05d}-of-{self._shards:05d}.safetensors"

    def has(self, shard: int) -> bool:
        """Whether a shard has been written, perhaps by a run before this one."""
        return self.file(shard).is_file()

    def write(self, shard: int, tensors: Tensors, notes: Any) -> None:
        """A shard, and what is to be known of it when all are there."""
        self._notes[str(shard)] = notes
        self._write_job()
        save(self.file(shard), tensors)

    def notes(self) -> list[Any]:
        """Those of all shards."""
        return [self._notes[str(shard)] for shard in range(self._shards)]

    def finish(self, config: Mapping[str, Any], card: str, report: Mapping[str, Any]) -> None:
        """Everything beside the weights: from now on the folder is a checkpoint."""
        orbax.copy_small_files(self.source, self.out)
        self._write_json("model.safetensors.index.json", self._index())
        self._write_json(REPORT, report)
        (self.out / "README.md").write_text(card, encoding="utf-8")
        self._write_json("config.json", config)
        (self.out / JOB).unlink()

    def _index(self) -> dict[str, Any]:
        files: dict[str, str] = {}
        size = 0
        for shard in range(self._shards):
            file = self.file(shard)
            with file.open("rb") as handle:
                infos = read_header(file, handle.fileno())
            files |= dict.fromkeys(infos, file.name)
            size += sum(info.nbytes for info in infos.values())
        return {"metadata": {"total_size": size}, "weight_map": files}

    def _write_json(self, name: str, value: Any) -> None:
        (self.out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
