"""How far each quantised matrix is from the original, as a table and as text of the written checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from lmdeploy_jax.lite.rounding import Rounded
from lmdeploy_jax.lite.weights import Matrix


@dataclass(frozen=True)
class Error:
    """Of one matrix, root mean squares relative to the original's."""

    layer: int
    matrix: str
    weight: float
    """Of its elements, those that clipping moves included."""
    output: float | None = None
    """Of what it makes of calibration's inputs; None: it was given none."""
    nearest: float | None = None
    """Of the same, where each element is rounded to the nearest."""


def measure(layer: int, matrix: Matrix, rounded: Rounded, original: Matrix, nearest: Rounded | None) -> Error:
    """The error of `rounded`, which stands for `matrix`, and of `nearest`, which does for `original`."""
    if matrix.inputs is None or original.inputs is None or nearest is None:
        return Error(layer, matrix.name, float(_errors(rounded, matrix.weight)[0]))
    weight, output = _errors(rounded, matrix.weight, matrix.inputs.gram)
    plain = _errors(nearest, original.weight, original.inputs.gram)[1]
    return Error(layer, matrix.name, float(weight), float(output), float(plain))


@jax.jit
def _errors(
    rounded: Rounded, weight: Float32[Array, "N K"], gram: Float32[Array, "K K"] | None = None
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Of the weight, and of what it makes of inputs; 0 where these are not known."""
    difference = rounded.dense() - weight
    sizes = jnp.linalg.norm(difference), jnp.linalg.norm(weight)
    if gram is None:
        return sizes[0] / sizes[1], jnp.zeros(())
    squares = [jnp.vdot(each @ gram, each) for each in (difference, weight)]
    return sizes[0] / sizes[1], jnp.sqrt(jnp.maximum(squares[0], 0) / jnp.maximum(squares[1], 1e-30))


def report(job: Mapping[str, Any], errors: Iterable[Error]) -> dict[str, Any]:
    """As JSON has it."""
    return {"job": dict(job), "errors": [asdict(error) for error in errors]}


def table(errors: Sequence[Error]) -> str:
    """One line a kind of matrix in all layers, in Markdown: means, and the worst."""
    kinds: dict[str, list[Error]] = {}
    for error in errors:
        kind = ".".join(part for part in error.matrix.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append(error)
    rows = [_row(kind, found) for kind, found in sorted(kinds.items())]
    head = "| weights | count | error of the weights | of the outputs | worst | if rounded to the nearest |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _row(kind: str, errors: Sequence[Error]) -> str:
    outputs = [error.output for error in errors if error.output is not None]
    plain = [error.nearest for error in errors if error.nearest is not None]
    cells = [
        _mean([error.weight for error in errors]),
        _mean(outputs),
        _percent(max(outputs, default=None)),
        _mean(plain),
    ]
    return f"| {kind} | {len(errors)} | {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    return _percent(sum(values) / len(values) if values else None)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g} %"


def model_card(
    name: str, method: str, settings: Mapping[str, Any], calibration: str, errors: Sequence[Error]
) -> str:
    """README.md of a checkpoint made of the model `name`."""
    said = "\n".join(f"- {key}: {value}" for key, value in settings.items() if value is not None)
    return f"""---
base_model: {name}
tags: [{settings["quant_method"]}, quantized]
---

# {name}, quantised

Written by `lmdeploy_jax lite {method}` from `{name}`. Quantised are the linear layers of the
decoder's blocks; everything else, the output head and embeddings among it, is as it was.

{said}
- calibration: {calibration}

Errors are root mean squares relative to the original's, means over all layers; `lite_report.json` has each.

{table(errors)}
"""
