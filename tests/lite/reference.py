"""The papers' formulas in NumPy and float64, with the inputs themselves: the oracle of `lite`."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def fit(grouped: Array, *, symmetric: bool = False) -> tuple[Array, Array]:
    """Scales, as float16 holds them, and zero points of groups along the last axis."""
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    reach = 2 * np.maximum(-low, high) if symmetric else high - low
    scales = np.maximum(np.float32(np.maximum(reach, 1e-5) / 15), 2.0**-14).astype(np.float16).astype(float)
    zeros = np.full_like(scales, 8) if symmetric else np.clip(np.round(-low / scales), 0, 15)
    return scales, zeros


def rounded(weight: Array, group: int, *, symmetric: bool = False) -> Array:
    """A weight [N, K] in 4 bits: what the codes stand for."""
    grouped = weight.reshape(len(weight), -1, group)
    scales, zeros = (each[..., None] for each in fit(grouped, symmetric=symmetric))
    codes = np.clip(np.round(grouped / scales) + zeros, 0, 15)
    return ((codes - zeros) * scales).reshape(weight.shape)


def importance(weights: Array, group: int) -> Array:
    """Of each channel, the mean over rows of |w| by the largest |w| of its group."""
    grouped = np.abs(weights).reshape(len(weights), -1, group)
    return (grouped / grouped.max(-1, keepdims=True)).reshape(weights.shape).mean(0)


def scales_at(ratio: float, inputs: Array, weights: Array) -> Array:
    scales = np.maximum(inputs**ratio / np.maximum(weights ** (1 - ratio), 1e-4), 1e-4)
    return scales / np.sqrt(scales.max() * scales.min())


def awq_losses(x: Array, weight: Array, group: int) -> tuple[Array, list[Array]]:
    """For no scales and for each ratio of the grid: the squared error of the product, and the scales."""
    means, channels = np.abs(x).mean(0), importance(weight, group)
    candidates = [np.ones(len(means)), *(scales_at(i / 20, means, channels) for i in range(20))]
    outputs = [x @ (rounded(weight * scales, group) / scales).T for scales in candidates]
    return np.array([((made - x @ weight.T) ** 2).sum() for made in outputs]), candidates


def awq_clipped(x: Array, weight: Array, group: int) -> tuple[Array, Array]:
    """The clipped weight, and by how much the best share of each group [N, G] beats the second."""
    count = weight.shape[1] // group
    grouped, inputs = weight.reshape(len(weight), count, group), x.reshape(len(x), count, group)
    most, errors, made = np.abs(grouped).max(-1, keepdims=True), [], []
    for step in range(10):
        share = most * (1 - step / 20)
        within = np.clip(grouped, -share, share)
        difference = rounded(within.reshape(weight.shape), group).reshape(grouped.shape) - grouped
        errors.append((np.einsum("tga,nga->tng", inputs, difference) ** 2).sum(0))
        made.append(within)
    ordered = np.sort(np.stack(errors), axis=0)
    best = np.take_along_axis(np.stack(made), np.argmin(np.stack(errors), 0)[None, ..., None], 0)[0]
    return best.reshape(weight.shape), ordered[1] / ordered[0] - 1


def gptq(x: Array, weight: Array, group: int, damping: float, order: Array | None = None) -> Array:
    """The paper's algorithm 1, a column at a time; symmetric groups, scales of the original weight."""
    scales, zeros = fit(weight.reshape(len(weight), -1, group), symmetric=True)
    columns = np.arange(weight.shape[1]) if order is None else order
    hessian = (x.T @ x)[np.ix_(columns, columns)]
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, made = weight[:, columns].copy(), np.zeros_like(weight)
    for j, column in enumerate(columns):
        scale, zero = scales[:, column // group], zeros[:, column // group]
        made[:, column] = (np.clip(np.round(left[:, j] / scale) + zero, 0, 15) - zero) * scale
        error = (left[:, j] - made[:, column]) / upper[j, j]
        left[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return made


def smooth_scales(x: Array, weight: Array, alpha: float = 0.5) -> Array:
    return scales_at(alpha, np.abs(x).max(0), importance(weight, weight.shape[1]))
