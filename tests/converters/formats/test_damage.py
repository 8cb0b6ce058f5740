"""Damaged and inconsistent quantised checkpoints end in an error that names the tensor and the remedy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmdeploy_jax.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.converters.formats.packers import CASES, Tensors, tell
from tests.converters.formats.test_formats import NAME, read_module
from tests.converters.harmful import spoil

SHAPE = (64, 128)


def packed(kind: str) -> Tensors:
    return CASES[kind].pack(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))[0]


def read_all(folder: Path, kind: str, tensors: Tensors) -> None:
    (folder / "config.json").write_text("{}")
    tell(folder, CASES[kind])
    reader = read_module(folder, tensors)
    for name in reader.names():
        reader.read(name)


def put(role: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {role: np.ascontiguousarray(change(tensors[role]))}


def without(role: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: array for name, array in tensors.items() if name != role}


def odd(array: np.ndarray) -> np.ndarray:
    """One value is another."""
    return np.where(np.arange(array.size).reshape(array.shape) == 3, array + 1, array).astype(array.dtype)


DAMAGE = {
    "a scale is missing": ("awq", without("scales"), "missing tensor {}.scales, which belongs to {}.qweight"),
    "zero points are missing": ("awq", without("qzeros"), "missing tensor {}.qzeros"),
    "words are missing": ("awq", without("qweight"), "missing tensor {}.qweight"),
    "both of a weight": (
        "awq", lambda t: t | {"weight": np.ones(SHAPE, np.float32)},
        "holds the same weight"),
    "a group too many": (
        "awq", put("scales", lambda a: np.concatenate([a, a[:1]])),
        "{}.scales: has 9 groups, which do not divide 128"),
    "groups of another size": (
        "awq", lambda t: put("scales", lambda a: a[::2])(put("qzeros", lambda a: a[::2])(t)),
        "{}.scales: has groups of 32 columns, but group_size is 16 in the config"),
    "scales of another weight": (
        "awq", put("scales", lambda a: a[:, :32]),
        "{}.scales: has shape [8, 32]; {}.qweight"),
    "words of another dtype": (
        "awq", put("qweight", lambda a: a.view(np.float32)),
        "{}.qweight: is float32 [128, 8]"),
    "zeros where there are none": (
        "awq_sym", lambda t: t | {"qzeros": np.zeros((4, 8), np.int32)},
        "{}.qzeros: holds zero points other than 8"),
    "a group out of range": (
        "gptq_act_order", put("g_idx", lambda a: a + 1),
        "{}.g_idx: holds groups from 1 to 8, but there are 8"),
    "a group below zero": (
        "gptq_act_order", put("g_idx", lambda a: a - 1),
        "{}.g_idx: holds groups from -1 to 6"),
    "a group a column": ("gptq", put("g_idx", lambda a: a[1:]), "{}.g_idx: has shape [127]"),
    "zeros of symmetric weights": (
        "gptq", put("qzeros", odd),
        "{}.qzeros: holds zero points from 7 to 8, but sym is true in the config"),
    "bits of another kind": (
        "gptq", put("qzeros", lambda a: a[:, :6]),
        "{}.qzeros: packs 64 outputs of 3 bits"),
    "a shape that was not packed": (
        "ct_w4", put("weight_shape", lambda a: a + np.array([0, 64])),
        "{}.weight_shape: holds [64, 192], which 4 bits do not pack into 64 rows of 16 words"),
    "a zero point of symmetric weights": (
        "ct_int8", lambda t: t | {"weight_zero_point": np.ones((64, 1), np.int8)},
        "{}.weight_zero_point: holds zero points other than 0"),
    "a zero point too few": (
        "ct_w4_asym", without("weight_zero_point"),
        "missing tensor {}.weight_zero_point"),
    "a block too few": (
        "fp8_block", put("weight_scale_inv", lambda a: np.zeros((2, 1), np.float32)),
        "{}.weight_scale_inv: has shape [2, 1]; blocks of [128, 128] ask for [1, 1]"),
    "no scale": (
        "fp8_block", without("weight_scale_inv"),
        "missing tensor {}.weight_scale_inv, which belongs to {}.weight"),
    "scales of some rows": (
        "smooth_int8", put("scale", lambda a: a[:9]),
        "{}.scale: has shape [9, 1]; 64 rows ask"),
    "integers that are floats": (
        "smooth_int8", put("weight", lambda a: a.astype(np.float32)), "{}.weight: is float32 [64, 128]"),
    "scales that are integers": (
        "smooth_int8", put("scale", lambda a: a.astype(np.int32)),
        "{}.scale: is int32 [64, 1]; scales are floats"),
    "another dtype than told": (
        "smooth_fp8", put("weight", lambda a: a.astype(np.int8)),
        "{}.weight: is int8, but quant"),
    "a global scale of 0": (
        "ct_nvfp4", put("weight_global_scale", np.zeros_like), "{}.weight_global_scale: is 0.0; it must be"),
    "two global scales": (
        "modelopt_nvfp4", put("weight_scale_2", lambda a: a.repeat(2)),
        "{}.weight_scale_2: has shape [2]; it must be one"),
    "scales of another group": (
        "ct_mxfp4", put("weight_scale", lambda a: a[:, ::2]), "{}.weight_scale: has shape [64, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, tmp_path: Path) -> None:
    kind, change, message = DAMAGE[what]
    with pytest.raises(CheckpointError) as caught:
        read_all(tmp_path, kind, change(packed(kind)))
    text = str(caught.value)
    assert message.replace("{}", NAME) in text
    assert str(tmp_path) in text
    assert "give an intact checkpoint, or the 16-bit one" in text or "remove one of the two" in text


def spoil_tensor(tensors: Tensors, rng: random.Random) -> Tensors:
    role = rng.choice(sorted(tensors))
    array = tensors[role]
    kinds = [np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.bool_]
    changes: list[Callable[[], np.ndarray | None]] = [
        lambda: None,
        lambda: array.T,
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: array[:-1] if array.ndim else array,
        lambda: np.concatenate([array, array]) if array.ndim else array,
        lambda: np.zeros((0, 4), array.dtype),
        lambda: np.zeros((), array.dtype),
        lambda: array.astype(np.float32).astype(rng.choice(kinds)),
        lambda: np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(array.shape),
    ]
    made = rng.choice(changes)()
    return (
        without(role)(tensors)
        if made is None
        else tensors | {role: np.ascontiguousarray(made).reshape(made.shape)}
    )


@pytest.mark.parametrize("number", range(120))
def test_any_damage_reads_or_is_refused(number: int, tmp_path: Path) -> None:
    """Random tensors, settings, or both; nothing but the errors that a user is to see."""
    rng = random.Random(number)
    kind = rng.choice(sorted(CASES))
    tensors = packed(kind)
    (tmp_path / "config.json").write_text("{}")
    tell(tmp_path, CASES[kind])
    if rng.random() < 0.6:
        tensors = spoil_tensor(tensors, rng)
    else:
        file = tmp_path / (CASES[kind].side_file or "config.json")
        document = json.loads(file.read_text())
        for _ in range(rng.randint(1, 3)):
            spoil(document, rng)
        file.write_text(json.dumps(document))
    try:
        reader = read_module(tmp_path, tensors)
    except AssertionError:  # the settings are gone
        return
    except (CheckpointError, ConfigError, UnsupportedModelError) as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert str(tmp_path) in refusal
        return
    with np.errstate(all="ignore"):
        for name in reader.names():
            assert reader.read(name).shape == reader.info(name).shape
