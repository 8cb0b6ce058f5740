"""Statistics of what the linear layers of a checkpoint are given, alone in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmdeploy_jax.lite.awq import Awq
from lmdeploy_jax.lite.calibration import Calibration
from lmdeploy_jax.lite.plan import Plan
from lmdeploy_jax.lite.source import open_source
from lmdeploy_jax.lite.statistics import InputStatistics
from lmdeploy_jax.lite.stream import Stream
from lmdeploy_jax.lite.weights import WEIGHT, LayerWeights
from lmdeploy_jax.lite.writer import save

FILE = "inputs_stats.safetensors"


def calibrate(
    name: str, folder: Path, out: Path, calibration: Calibration, on_layer: Callable[[int, int], None]
) -> Path:
    """Writes `out`/inputs_stats.safetensors: of each linear layer of the model `name`, by its name in the
    checkpoint, `max`, `min`, `mean`, `absmax` and `absmean` of each of its inputs, float32. An expert without
    a token has none.

    Raises what `open_source` and `Plan.check_runs` raise.
    """
    plan = Plan(open_source(folder), Awq())
    plan.check_runs(name)
    out.mkdir(parents=True, exist_ok=True)
    stream = Stream(plan.source, calibration.windows, calibration.batch_size, plan.dtype)
    found: dict[str, np.ndarray] = {}
    for i, model in enumerate(plan.models):
        weights = LayerWeights(model, plan.source.layers[i])
        weights.found = stream.advance(model, weights.arrays)
        for module in model.observed:
            for matrix in weights.matrices(module):
                for tensor in matrix.tensors if matrix.inputs is not None else ():
                    assert matrix.inputs is not None
                    written = plan.source.written(tensor).removesuffix(WEIGHT)
                    found |= {f"{written}.{key}": array for key, array in _told(matrix.inputs).items()}
        on_layer(i + 1, len(plan.models))
    save(out / FILE, found)
    return out / FILE


def _told(inputs: InputStatistics) -> dict[str, np.ndarray]:
    told = {
        "max": inputs.high,
        "min": inputs.low,
        "mean": inputs.total / inputs.count,
        "absmax": inputs.absmax,
        "absmean": inputs.absmean,
    }
    return {key: np.array(array) for key, array in told.items()}
