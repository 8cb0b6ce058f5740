"""Key tables: fused weights equal NumPy's assembly, whole and by slice; all faults are named."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmdeploy_jax.converters.keytable import Leaf, Rule, bind
from lmdeploy_jax.converters.layouts import GroupedQKV, Layout, PermutedHeads, Rows, Stack
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.errors import CheckpointError

KH, G, D, E, INNER, VOCAB = 2, 4, 3, 8, 6, 5
LAYER = r"model\.layers\.(\d+)\."
RULES = (
    Rule(LAYER + r"self_attn\.([qkv])_proj\.weight", r"layers.\1.qkv.weight", r"\2", GroupedQKV()),
    Rule(LAYER + r"self_attn\.([qkv])_proj\.bias", r"layers.\1.qkv.bias", r"\2", GroupedQKV()),
    Rule(LAYER + r"self_attn\.o_proj\.weight", r"layers.\1.o.weight", layout=Rows(flat_columns=True)),
    Rule(LAYER + r"mlp\.(gate|up)_proj\.weight", r"layers.\1.gate_up.weight", r"\2", Stack(("gate", "up"))),
    Rule(r"model\.embed_tokens\.weight", "embed.weight", layout=Rows(valid=VOCAB)),
    Rule(r".*rotary_emb\.inv_freq", None),
)
SHAPES = {
    "embed.weight": (VOCAB + 3, E),
    "layers.0.qkv.weight": (KH, G + 2, D, E),
    "layers.0.qkv.bias": (KH, G + 2, D),
    "layers.0.o.weight": (E, KH, G, D),
    "layers.0.gate_up.weight": (2, INNER, E),
}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, E),
        attention + "q_proj.weight": (KH * G * D, E),
        attention + "k_proj.weight": (KH * D, E),
        attention + "v_proj.weight": (KH * D, E),
        attention + "q_proj.bias": (KH * G * D,),
        attention + "k_proj.bias": (KH * D,),
        attention + "v_proj.bias": (KH * D,),
        attention + "o_proj.weight": (E, KH * G * D),
        attention + "rotary_emb.inv_freq": (D,),
        mlp + "gate_proj.weight": (INNER, E),
        mlp + "up_proj.weight": (INNER, E),
    }
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


def fuse_qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray, replicas: int = 1) -> np.ndarray:
    """The same fusion by reshapes: [KH * r, G / r + 2, D, ...]."""
    rest = q.shape[1:]
    queries = q.reshape(KH * replicas, G // replicas, D, *rest)
    keys, values = (np.repeat(x.reshape(KH, 1, D, *rest), replicas, axis=0) for x in (k, v))
    return np.concatenate([queries, keys, values], axis=1)


def open_folder(folder: Path, content: dict[str, np.ndarray]) -> CheckpointReader:
    save_file(content, folder / "model.safetensors")
    return CheckpointReader(folder)


def assert_equal_by_slices(leaf: Leaf, expected: np.ndarray) -> None:
    """Whole, and every combination of halves along the axes, in another dtype."""
    assert leaf.shape == expected.shape
    np.testing.assert_array_equal(leaf.read((), expected.dtype), expected)
    cuts = [(slice(None), slice(0, -(-n // 2)), slice(n // 2, n)) for n in expected.shape]
    for index in itertools.product(*cuts):
        np.testing.assert_array_equal(
            leaf.read(index, np.dtype(np.float32)), expected[index].astype(np.float32)
        )


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    return tensors()


@pytest.fixture(scope="module")
def leaves(tmp_path_factory: pytest.TempPathFactory, source: dict[str, np.ndarray]) -> dict[str, Leaf]:
    return bind(RULES, open_folder(tmp_path_factory.mktemp("checkpoint"), source), SHAPES)


def expected_leaf(name: str, source: dict[str, np.ndarray]) -> np.ndarray:
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    kind = name.rsplit(".", 1)[1]
    if name == "embed.weight":
        return np.pad(source["model.embed_tokens.weight"], ((0, 3), (0, 0)))
    if ".qkv." in name:
        return fuse_qkv(*(source[f"{attention}{x}_proj.{kind}"] for x in "qkv"))
    if ".o." in name:
        return source[attention + "o_proj.weight"].reshape(E, KH, G, D)
    return np.stack([source[mlp + "gate_proj.weight"], source[mlp + "up_proj.weight"]])


@pytest.mark.parametrize("name", SHAPES)
def test_fused_weights(name: str, leaves: dict[str, Leaf], source: dict[str, np.ndarray]) -> None:
    assert_equal_by_slices(leaves[name], expected_leaf(name, source))


@pytest.mark.parametrize("packing", ["split", "rows", "grouped"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_qkv_packings(tmp_path: Path, packing: str, replicas: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n * D, E)).astype(np.float32) for n in (KH * G, KH, KH))
    packed = {
        "split": {"q": q, "k": k, "v": v},
        "rows": {"w": np.concatenate([q, k, v])},
        "grouped": {"w": fuse_qkv(q, k, v).reshape(-1, E)},
    }[packing]
    layout = GroupedQKV(replicas, packing)
    rule = Rule("([qkv])", "qkv", r"\1", layout) if packing == "split" else Rule("w", "qkv", layout=layout)
    expected = fuse_qkv(q, k, v, replicas)
    leaf = bind([rule], open_folder(tmp_path, packed), {"qkv": expected.shape})["qkv"]
    assert_equal_by_slices(leaf, expected)


@pytest.mark.parametrize(
    ("layout", "stored", "target"),
    [
        (Rows(3), (KH * (G + 2) * D, E), (KH, G + 2, D, E)),
        (Rows(2), (2 * INNER, E), (2, INNER, E)),
        (Rows(), (4, 2, 3), (4, 2, 3)),
    ],
)
def test_reshaped_rows(
    tmp_path: Path, layout: Layout, stored: tuple[int, ...], target: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(stored), dtype=np.float32).reshape(stored)
    leaf = bind([Rule("w", "w", layout=layout)], open_folder(tmp_path, {"w": array}), {"w": target})["w"]
    assert_equal_by_slices(leaf, array.reshape(target))


def test_experts_stack_along_two_axes(tmp_path: Path) -> None:
    experts = np.arange(3 * 2 * 4 * 5, dtype=np.float32).reshape(3, 2, 4, 5)
    content = {f"experts.{x}.{p}": experts[x, i] for x in range(3) for i, p in enumerate(("gate", "up"))}
    layout = Stack(tuple(f"{x}.{p}" for x in range(3) for p in ("gate", "up")), axes=2)
    rule = Rule(r"experts\.(\d+)\.(gate|up)", "experts", r"\1.\2", layout)
    leaf = bind([rule], open_folder(tmp_path, content), {"experts": experts.shape})["experts"]
    assert_equal_by_slices(leaf, experts)


def test_heads_stack_with_their_elements(tmp_path: Path) -> None:
    parts = np.arange(3 * 4 * 6 * 5, dtype=np.float32).reshape(3, 4, 6, 5)
    content = {name: parts[i].reshape(24, 5) for i, name in enumerate("qkv")}
    rule = Rule("([qkv])", "qkv", r"\1", Stack(("q", "k", "v"), rows=2))
    leaf = bind([rule], open_folder(tmp_path, content), {"qkv": parts.shape})["qkv"]
    assert_equal_by_slices(leaf, parts)


@pytest.mark.parametrize("columns", [(5,), ()])
def test_heads_of_q_and_k_in_another_order(tmp_path: Path, columns: tuple[int, ...]) -> None:
    stored = np.arange(3 * 2 * 4 * np.prod(columns, dtype=int), dtype=np.float32).reshape(3, 2, 4, *columns)
    order = (2, 0, 3, 1)
    expected = stored.copy()
    expected[:2] = stored[:2][:, :, list(order)]
    rule = Rule("w", "qkv", layout=PermutedHeads(order))
    reader = open_folder(tmp_path, {"w": stored.reshape(24, *columns)})
    assert_equal_by_slices(bind([rule], reader, {"qkv": stored.shape})["qkv"], expected)
    with pytest.raises(ValueError, match="4 elements does not fit"):
        PermutedHeads(order).assemble((3, 2, 5))


def test_a_slice_reads_only_its_own_sources(leaves: dict[str, Leaf], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = CheckpointReader.read_into

    def spy(self: CheckpointReader, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        read.append(f"{name.split('.')[-2]} {index[0].start}:{index[0].stop}")
        original(self, name, index, out)

    monkeypatch.setattr(CheckpointReader, "read_into", spy)
    leaves["layers.0.qkv.weight"].read((slice(1, 2),), np.dtype(np.float32))
    assert read == ["q_proj 12:24", "k_proj 3:6", "v_proj 3:6"]


def test_every_fault_is_named_at_once(tmp_path: Path, source: dict[str, np.ndarray]) -> None:
    content = dict(source)
    del content["model.layers.0.self_attn.k_proj.bias"]
    del content["model.layers.0.self_attn.o_proj.weight"]
    content["model.embed_tokens.weight"] = np.zeros((VOCAB + 1, E), np.float32)
    content["model.layers.1.mlp.up_proj.weight"] = np.zeros((INNER, E), np.float32)
    content["visual.patch"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError) as caught:
        bind(RULES, open_folder(tmp_path, content), SHAPES)
    message = str(caught.value)
    assert "missing tensor model.layers.0.self_attn.k_proj.bias" in message
    assert "missing tensor model.layers.0.self_attn.o_proj.weight" in message
    assert "model.embed_tokens.weight: shape [6, 8], config.json asks for [5, 8]" in message
    assert "extra tensor model.layers.1.mlp.up_proj.weight" in message
    assert "unknown tensor visual.patch" in message
    assert message.count("\n") == 5


def test_two_matching_rules_are_a_fault(tmp_path: Path) -> None:
    reader = open_folder(tmp_path, {"w": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"ambiguous tensor w: w and \."):
        bind([Rule("w", "w"), Rule(".", "w")], reader, {"w": (2,)})


def test_two_tensors_for_one_place_are_a_fault(tmp_path: Path) -> None:
    reader = open_folder(tmp_path, {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="ambiguous tensor b: a fills the same place"):
        bind([Rule("[ab]", "w")], reader, {"w": (2,)})


def test_integers_are_not_read_as_floats(tmp_path: Path) -> None:
    leaf = bind([Rule("w", "w")], open_folder(tmp_path, {"w": np.zeros(2, np.int8)}), {"w": (2,)})["w"]
    with pytest.raises(CheckpointError, match="w: stored as int8"):
        leaf.read((), np.dtype(np.float32))
