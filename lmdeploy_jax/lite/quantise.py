"""Quantises a checkpoint, a layer at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.converters.formats import recognise
from lmdeploy_jax.converters.formats.reader import QuantReader
from lmdeploy_jax.converters.formats.scheme import is_float
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.text_part import TextPartReader
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.layouts import Tensors
from lmdeploy_jax.lite.methods import Method, options
from lmdeploy_jax.lite.plan import Plan
from lmdeploy_jax.lite.report import Error, measure, model_card, report
from lmdeploy_jax.lite.rounding import Rounded
from lmdeploy_jax.lite.source import Source, open_source
from lmdeploy_jax.lite.stream import Stream
from lmdeploy_jax.lite.weights import WEIGHT, LayerWeights, Matrix
from lmdeploy_jax.lite.writer import Writer

log = logging.getLogger("lmdeploy_jax")
OnLayer = Callable[[int, int, Sequence[Error]], None]


@dataclass(frozen=True)
class Job:
    """The model called `name`, in `folder`, into `out`. dtype: of plain tensors; None: as it is."""

    name: str
    folder: Path
    out: Path
    method: Method
    calibration: Calibration | None = None
    dtype: np.dtype | None = None

    def run(self, *, force: bool = False, on_layer: OnLayer = lambda *_: None) -> list[Error]:
        """Writes the checkpoint, going on where an earlier run of the same job ended -> all errors.

        on_layer(layers done, layers in all, the errors of the last). Raises what `open_source` and `Writer`
        raise, and ConfigError where the groups of columns do not fit.
        """
        source = open_source(self.folder)
        plan = Plan(source, self.method)
        plan.check()
        if self.calibration is not None:
            plan.check_runs(self.name)
        work = _Work(self, plan)
        writer = Writer(
            self.out, self.folder, self._identity(source), len(source.config.layers) + 1, force=force
        )
        work.write(writer, on_layer)
        errors = [Error(**fields) for notes in writer.notes() for fields in notes]
        settings = self.method.layout.settings(plan.plain_modules)
        card = model_card(self.name, self.method.name, settings, str(self.calibration or "none"), errors)
        writer.finish(self._config(source, settings), card, report(writer.job, errors))
        return errors

    def _identity(self, source: Source) -> dict[str, Any]:
        """What two runs have in common that write the same bytes."""
        files = sorted({info.file for info in map(source.files.info, source.files.names())})
        windows = None if self.calibration is None else self.calibration.windows
        return {
            **options(self.method),
            "model": self.name,
            "config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "files": [[file.name, file.stat().st_size] for file in files],
            "calibration": None if self.calibration is None else str(self.calibration),
            "tokens": None if windows is None else hashlib.sha256(windows.tobytes()).hexdigest(),
            "dtype": None if self.dtype is None else self.dtype.name,
            "platform": jax.default_backend(),
        }

    def _config(self, source: Source, settings: Mapping[str, Any]) -> dict[str, Any]:
        config = {**source.raw, "quantization_config": dict(settings)}
        if self.dtype is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = self.dtype.name
        return config


@jax.jit
def _rows(rounded: Rounded, rows: np.ndarray) -> Rounded:
    return jax.tree.map(lambda array: array[rows], rounded)


class _Work:
    """One run of a job."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self.job, self.plan, self.source, self.method = job, plan, plan.source, job.method

    def write(self, writer: Writer, on_layer: OnLayer) -> None:
        """All shards that are not there yet."""
        if not writer.has(0):
            writer.write(0, {name: self._plain(name) for name in self.source.outer}, [])
        calibration, stream = self.job.calibration, None
        if calibration is not None and self.method.calibrates:
            stream = Stream(self.source, calibration.windows, calibration.batch_size, self.plan.dtype)
        for i in range(len(self.plan.models)):
            errors = self._step(i, writer, stream) if stream is not None or not writer.has(i + 1) else []
            on_layer(i + 1, len(self.plan.models), errors)

    def _step(self, index: int, writer: Writer, stream: Stream | None) -> list[Error]:
        """Writes a layer, unless it is there, and leads calibration's tokens through it."""
        model, written = self.plan.models[index], writer.has(index + 1)
        weights = LayerWeights(model, self.source.layers[index], self.job.dtype)
        if stream is not None and not self.method.feeds_back:
            weights.found = stream.advance(model, weights.arrays)
        elif stream is not None and not written:
            weights.found = stream.observe(model, weights.arrays)
        errors: list[Error] = []
        if not written:
            tensors, errors = self._layer(index, weights)
            writer.write(index + 1, tensors, [asdict(error) for error in errors])
        if stream is not None and self.method.feeds_back:
            stream.advance(model, self._read_back(index, writer.out))
        return errors

    def _read_back(self, index: int, out: Path) -> dict[str, jax.Array]:
        """The layer's weights as the shards have them: what was interrupted goes on with the same."""
        model, settings = self.plan.models[index], self.method.layout.settings(())
        quantisation = recognise({"quantization_config": settings}, str(out))
        assert quantisation is not None
        with CheckpointReader(out) as files:
            text = files if self.source.text is None else TextPartReader(files)
            reader = QuantReader(text, quantisation)
            return {
                name: jnp.asarray(replace(leaf, reader=reader).read((), np.dtype(model.dtypes[name])))
                for name, leaf in self.source.layers[index].items()
            }

    def _layer(self, index: int, weights: LayerWeights) -> tuple[Tensors, list[Error]]:
        """The tensors of a layer's shard."""
        self.method.prepare(weights)
        self._tell_unseen(index, weights)
        tensors: Tensors = {}
        errors = []
        for module in self.plan.targets[index]:
            originals = weights.matrices(module, folded=False)
            for matrix, original in zip(weights.matrices(module), originals, strict=True):
                plain = self._plain_dtype(next(iter(matrix.tensors)))
                rounded = self.method.round(matrix, plain)
                nearest = None if matrix.inputs is None else self.method.nearest(original, plain)
                errors.append(measure(index, matrix, rounded, original, nearest))
                tensors |= self._rounded(matrix, rounded, plain)
        kept = weights.leaves.keys() - {module + WEIGHT for module in self.plan.targets[index]}
        for name in sorted(kept):
            tensors |= self._kept(name, weights)
        return tensors, errors

    def _tell_unseen(self, index: int, weights: LayerWeights) -> None:
        for module, found in weights.found.items():
            unseen = int((np.asarray(found.count) == 0).sum())
            if unseen:
                log.warning(
                    "layer %d, %s: no token came by %d of %d experts, which are rounded to the nearest",
                    index, module, unseen, found.count.size,
                )  # fmt: skip

    def _rounded(self, matrix: Matrix, rounded: Rounded, plain: np.dtype) -> Tensors:
        found = {}
        for name, rows in matrix.tensors.items():
            part = _rows(rounded, rows)
            module = self.source.written(name).removesuffix(WEIGHT)
            for role, array in self.method.layout.tensors(part, plain).items():
                found[f"{module}.{role}"] = array
        return found

    def _kept(self, leaf: str, weights: LayerWeights) -> Tensors:
        """The tensors of a weight that is not quantised, but into which scales may be folded."""
        names = weights.leaves[leaf].names.values()
        if leaf not in weights.changed():
            return {self.source.written(name): self._plain(name) for name in names}
        changed = weights.source_tensors(leaf)
        return {self.source.written(name): changed[name].astype(self._plain_dtype(name)) for name in names}

    def _plain(self, name: str) -> np.ndarray:
        array = self.source.reader(name).read(name)
        return array.astype(self._plain_dtype(name), copy=False)

    def _plain_dtype(self, name: str) -> np.dtype:
        stored = self.source.reader(name).info(name).dtype
        return self.job.dtype if self.job.dtype is not None and is_float(stored) else stored
