"""Weights that stay quantised on the devices: they stand for what the file stands for, at its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.device import Upload
from lmdeploy_jax.converters.formats.leaves import QuantLeaf, format_of, quant_leaves
from lmdeploy_jax.converters.formats.reader import QuantReader
from lmdeploy_jax.converters.keytable import Leaf, Rule, bind
from lmdeploy_jax.converters.layouts import Rows
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.converters.safetensors import CheckpointReader
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.formats import WeightFormat
from lmdeploy_jax.models.quantised import QuantArrays, dequantise
from tests.converters.formats.packers import CASES, Case, as_torch, gptq, quantise_folder, tell
from tests.converters.formats.test_formats import NAME, read_module
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import save_checkpoint

WEIGHTS = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def both(plain: Path, scratch: Path, case: Case) -> tuple[LoadedModel, LoadedModel]:
    """A quantised checkpoint, held quantised and widened."""
    quantise_folder(plain, scratch / "quantised", scratch / "dense", case)
    return load_model(scratch / "quantised", dequantise=False), load_model(scratch / "quantised")


def arrays_of(model: LoadedModel, name: str) -> QuantArrays:
    leaves = named_leaves(model)
    roles = (leaves.get(f"{name}.{role}") for role in QuantArrays._fields)
    return QuantArrays(*roles)  # type: ignore[arg-type]


SOME = ("awq", "gptq_8bit_asym", "gptq_act_order", "ct_w4_asym", "ct_nvfp4", "ct_mxfp8", "fp8_block")
KINDS = [pytest.param(kind, marks=() if kind in SOME else pytest.mark.full) for kind in CASES]
CUT_KINDS = [kind for kind in KINDS if kind.values != ("gptq_act_order",)]  # whose columns devices can share


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_held_as_it_was_stored(kind: str, llama: Path, tmp_path: Path) -> None:
    held, widened = both(llama, tmp_path, CASES[kind])
    names = {f"layers.{layer}.{weight}.weight" for layer in (0, 1) for weight in WEIGHTS}
    assert set(held.skeleton.formats) == names
    assert widened.skeleton.widened_elements == 0
    for name, leaf in named_leaves(widened).items():
        if name in held.skeleton.formats:
            ours = dequantise(held.skeleton.formats[name], arrays_of(held, name), jnp.float32)
            np.testing.assert_allclose(
                ours.reshape(leaf.shape), leaf, rtol=0, atol=1e-6 * float(jnp.abs(leaf).max())
            )
        else:
            np.testing.assert_array_equal(named_leaves(held)[name], leaf)


@pytest.mark.parametrize(("kind", "elements"), [("awq", 2 * 96 * 64), ("smooth_int8", 0)])
def test_what_xla_widens_is_known_to_the_memory_plan(
    kind: str, elements: int, llama: Path, tmp_path: Path
) -> None:
    """Of a 4-bit checkpoint its largest matrix, gate and up; 8 bits are multiplied as they are."""
    held, widened = both(llama, tmp_path, CASES[kind])
    assert held.skeleton.widened_elements == elements
    assert widened.skeleton.widened_elements == 0


@pytest.mark.parametrize(
    ("kind", "family"),
    [("awq", "qwen2"), ("ct_w8", "phi3"), ("modelopt_blocks", "gemma2"), ("ct_mxfp4", "internlm2")],
)
def test_logits_are_those_of_the_widened_weights(kind: str, family: str, tmp_path: Path) -> None:
    held, widened = both(save_checkpoint(family, tmp_path / "plain"), tmp_path, CASES[kind])
    (ours,), (theirs,) = (PagedRunner(model).ragged([(0, 0, IDS, len(IDS))]) for model in (held, widened))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


# --- One module, read as devices would ---------------------------------------------------------------------

RULES = (Rule(NAME.replace(".", r"\.") + r"\.weight", "w", "", Rows()), Rule(r"model\.norm\.weight", None))


def open_leaf(folder: Path, case: Case, weight: np.ndarray) -> tuple[Leaf, QuantReader]:
    (folder / "config.json").write_text("{}")
    tell(folder, case)
    reader = read_module(folder, case.pack(weight)[0])
    return bind(RULES, reader, {"w": weight.shape})["w"], reader


def read_share(
    leaves: dict[str, QuantLeaf], held: WeightFormat, rows: range, share: int, of: int
) -> np.ndarray:
    """What a device has that holds `rows`, and one part in `of` of the columns, dequantised."""

    def piece(role: str) -> jnp.ndarray | None:
        if (leaf := leaves.get(f"w.{role}")) is None:
            return None
        cut = slice(rows.start, rows.stop)
        length = leaf.shape[-1 if role == "values" else 0]
        along = slice(share * length // of, (share + 1) * length // of) if length > 1 else slice(0, 1)
        index = {"values": (cut, along), "row_scales": (cut,), "input_scale": ()}.get(role, (along, cut))
        return jnp.asarray(leaf.read(index, dtype_of(held, role)))

    return np.asarray(dequantise(held, QuantArrays(*map(piece, QuantArrays._fields)), jnp.float32))


def dtype_of(held: WeightFormat, role: str) -> np.dtype:
    scale = "uint8" if held.scale == "float8_e8m0fnu" else held.scale
    named = {"values": held.stored, "scales": scale, "zeros": held.zeros, "columns": "int32"}
    return jnp.dtype(named.get(role, "float32"))


@pytest.mark.parametrize("of", [2, 4])
@pytest.mark.parametrize("kind", CUT_KINDS)
def test_devices_have_their_shares_also_of_cut_groups(kind: str, of: int, tmp_path: Path) -> None:
    """96 columns: a quarter of them is less than a group of 32, which then is one of 8."""
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    leaf, reader = open_leaf(tmp_path, CASES[kind], weight)
    held = format_of(leaf, reader, of)
    assert held is not None
    leaves, whole = quant_leaves("w", leaf, reader, held), reader.read(f"{NAME}.weight")
    for share in range(of):
        columns = slice(share * 96 // of, (share + 1) * 96 // of)
        ours = read_share(leaves, held, range(8, 40), share, of)
        np.testing.assert_allclose(ours, whole[8:40, columns], rtol=1e-6)


PACKED = ("awq", "gptq", "gptq_8bit_asym", "gptq_act_order", "ct_w4_asym", "ct_w8")  # into words of 32 bits


@pytest.mark.parametrize("kind", [*PACKED, "rounded"])
def test_a_device_makes_of_the_file_s_arrays_what_the_host_would(
    kind: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused parts, all of them uploaded as the file has them, as on a GPU."""
    load = partial(load_model, llama, model_format="fp8", dequantise=False)
    if kind != "rounded":
        quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", CASES[kind])
        load = partial(load_model, tmp_path / "quantised", dequantise=False)
    hosts, upload, uploads = named_leaves(load()), QuantLeaf.upload, []

    def counted(self: QuantLeaf, index: Index) -> Upload | None:
        uploads.append(upload(self, index))
        return uploads[-1]

    monkeypatch.setattr("lmdeploy_jax.converters.device._on_cpu", lambda sharding: False)
    monkeypatch.setattr(QuantLeaf, "upload", counted)
    for name, leaf in named_leaves(load()).items():
        np.testing.assert_array_equal(leaf, hosts[name], err_msg=name)
        assert (leaf.dtype, leaf.sharding) == (hosts[name].dtype, hosts[name].sharding)
    assert sum(made is not None for made in uploads) == 2 * len(WEIGHTS)


@pytest.mark.parametrize("kind", PACKED)
def test_devices_make_their_shares(kind: str, tmp_path: Path) -> None:
    """Whole words of a device's rows and columns; where it has a part of a word, the host reads it."""
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    leaf, reader = open_leaf(tmp_path, CASES[kind], weight)
    held = format_of(leaf, reader, 1 if kind == "gptq_act_order" else 2)
    assert held is not None
    values = quant_leaves("w", leaf, reader, held)["w.values"]
    columns = slice(0, None) if kind == "gptq_act_order" else slice(values.shape[1] // 2, None)
    index = (slice(8, 40), columns)
    made = values.upload(index)
    assert made is not None
    assert sum(array.nbytes for array in made.arrays) >= values.read(index, dtype_of(held, "values")).nbytes
    found = made.finish(*made.arrays)
    np.testing.assert_array_equal(found, values.read(index, dtype_of(held, "values")))
    assert (values.upload((slice(3, 40), columns)) is None) == (kind == "awq")


AS_PUBLISHED = {
    kind: case for kind, case in CASES.items() if kind not in ("ct_fp8_block", "fp8_block_ue8m0")
}  # those two have smaller blocks than anybody publishes


@pytest.mark.parametrize("kind", AS_PUBLISHED)
def test_memory_is_that_of_the_file(kind: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    leaf, reader = open_leaf(tmp_path, CASES[kind], weight)
    held = format_of(leaf, reader, 1)
    assert held is not None
    leaves = quant_leaves("w", leaf, reader, held)
    ours = sum(
        np.prod(part.shape) * dtype_of(held, name.split(".")[1]).itemsize for name, part in leaves.items()
    )
    parts = reader.tensors[f"{NAME}.weight"].parts
    assert ours <= 1.05 * sum(parts.info(role).nbytes for role in parts.names)


def test_parts_of_several_kinds_are_widened(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of q, k and v was left plain: they are one weight here, which then is plain too."""
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", CASES["awq"])
    file, name = tmp_path / "quantised" / "model.safetensors", "model.layers.1.self_attn.v_proj"
    kept = {n: tensor for n, tensor in load_file(file).items() if not n.startswith(f"{name}.")}
    save_file(kept | {f"{name}.weight": torch.ones(32, 64)}, file)
    model = load_model(tmp_path / "quantised", dequantise=False)
    assert "layers.1.attention.qkv.weight" in named_leaves(model)
    assert "1 quantised weights are widened" in caplog.text
    assert "layers.1.attention.qkv.weight" in caplog.text
    assert "layers.0.attention.qkv.weight" in model.skeleton.formats


def test_orders_of_columns_that_differ_are_widened(llama: Path, tmp_path: Path) -> None:
    """q and k of GPTQ with act-order see the same activations, but nothing makes their orders the same."""
    case = CASES["gptq_act_order"]
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", case)
    file, name = tmp_path / "quantised" / "model.safetensors", "model.layers.1.self_attn.k_proj."
    weight = load_file(llama / "model.safetensors")[f"{name}weight"].numpy()
    other = gptq(weight, bits=4, group=16, sym=True, act_order=2)[0]
    save_file(load_file(file) | {f"{name}{role}": as_torch(array) for role, array in other.items()}, file)
    formats = load_model(tmp_path / "quantised", dequantise=False).skeleton.formats
    assert "layers.0.attention.qkv.weight" in formats
    assert "layers.1.attention.qkv.weight" not in formats


def test_devices_cannot_share_groups_whose_columns_lie_apart(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    leaf, reader = open_leaf(tmp_path, CASES["gptq_act_order"], weight)
    assert format_of(leaf, reader, 2) is None


def test_groups_of_parts_that_differ_are_cut(llama: Path, tmp_path: Path) -> None:
    """gate in groups of 16, up in groups of 32: both in groups of 16, the scales of up twice."""
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", CASES["ct_w4"])
    quantise_folder(llama, tmp_path / "other", tmp_path / "other_dense", CASES["ct_w4_asym"])
    file, name = tmp_path / "quantised" / "model.safetensors", "model.layers.0.mlp.gate_proj."
    other = {
        n: tensor for n, tensor in load_file(tmp_path / "other" / "model.safetensors").items() if name in n
    }
    save_file(load_file(file) | other, file)
    group = CASES["ct_w4_asym"].config["config_groups"]["group_0"] | {"targets": [name[:-1]]}
    config = CASES["ct_w4"].config
    mixed = config | {"config_groups": config["config_groups"] | {"group_1": group}}
    tell(tmp_path / "quantised", Case(mixed, CASES["ct_w4"].pack))
    model, weight = load_model(tmp_path / "quantised", dequantise=False), "layers.0.mlp.gate_up.weight"
    held = model.skeleton.formats[weight]
    assert (held.group, held.groups, held.zeros) == (16, 4, "uint8")
    theirs = named_leaves(load_model(tmp_path / "quantised"))[weight]
    np.testing.assert_allclose(dequantise(held, arrays_of(model, weight), jnp.float32), theirs, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ct_fp8_tensor", "fp8_tensor", "modelopt_fp8"])
def test_scales_of_activations_are_read(kind: str, tmp_path: Path) -> None:
    weight, case = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32), CASES[kind]
    leaf, reader = open_leaf(tmp_path, case, weight)
    held = format_of(leaf, reader, 1)
    assert held is not None
    assert held.input_scale
    (scale,) = quant_leaves("w", leaf, reader, held)["w.input_scale"].read((), np.dtype(np.float32))
    assert scale == case.pack(weight)[0]["input_scale"]


def test_parts_share_the_largest_scale_of_their_activations(llama: Path, tmp_path: Path) -> None:
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", CASES["fp8_tensor"])
    file, name = tmp_path / "quantised" / "model.safetensors", "model.layers.0.self_attn.{}_proj.input_scale"
    tensors, own = load_file(file), {"q": 0.5, "k": 0.75, "v": 0.25}
    save_file(tensors | {name.format(part): torch.tensor([scale]) for part, scale in own.items()}, file)
    model = load_model(tmp_path / "quantised", dequantise=False)
    assert named_leaves(model)["layers.0.attention.qkv.weight.input_scale"].tolist() == [0.75]
    assert named_leaves(model)["layers.1.attention.qkv.weight.input_scale"].tolist() == [0.5]
    tensors[name.format("k")] = torch.tensor([0.0])
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"k_proj.input_scale: holds \[0.0\]; it must be one positive"):
        load_model(tmp_path / "quantised", dequantise=False)


# --- Conversion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["awq", "ct_w8", "ct_int8", "fp8_block", "fp8_tensor", "smooth_e5m2", "ct_nvfp4", "gptq_act_order"],
)
def test_converted_checkpoints_hold_what_was_held(kind: str, llama: Path, tmp_path: Path) -> None:
    held, dense = both(llama, tmp_path, CASES[kind])
    formats = {name: asdict(form) for name, form in held.skeleton.formats.items()}
    out = orbax.save(tmp_path / "out", named_leaves(held), {"formats": formats}, tmp_path / "quantised")
    again = load_model(out, dequantise=False)
    assert again.skeleton.formats == held.skeleton.formats
    assert list(again.skeleton.specs) == list(held.skeleton.specs)
    for name, leaf in named_leaves(held).items():
        assert named_leaves(again)[name].dtype == leaf.dtype
        np.testing.assert_array_equal(named_leaves(again)[name], leaf, err_msg=name)
    for name, leaf in named_leaves(load_model(out)).items():  # widened, as by default on a CPU
        theirs = named_leaves(dense)[name]
        np.testing.assert_allclose(
            leaf, theirs, rtol=0, atol=1e-6 * float(jnp.abs(theirs).max()), err_msg=name
        )


@pytest.mark.parametrize("kind", sorted(AS_PUBLISHED.keys() - {"gptq_act_order"}))
def test_a_device_s_share_is_all_that_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows and half of the columns: a quarter of the packed weight."""
    weight = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
    leaf, reader = open_leaf(tmp_path, CASES[kind], weight)
    held = format_of(leaf, reader, 2)
    assert held is not None
    values = quant_leaves("w", leaf, reader, held)["w.values"]
    parts = reader.tensors[f"{NAME}.weight"].parts
    largest = max(parts.info(role).nbytes for role in parts.names)
    read, counts = CheckpointReader.read, []

    def counted(self: CheckpointReader, name: str, index: Index = ()) -> np.ndarray:
        counts.append(read(self, name, index).nbytes)
        return read(self, name, index)

    monkeypatch.setattr(CheckpointReader, "read", counted)
    half = values.shape[1] // 2
    values.read((slice(64, 192), slice(half, 2 * half)), dtype_of(held, "values"))
    assert sum(counts) == largest // 4


def test_an_output_head_may_be_quantised(llama: Path, tmp_path: Path) -> None:
    case = CASES["ct_int8"]
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", case)
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    packed, stands_for = case.pack(tensors.pop("lm_head.weight").numpy())
    save_file(tensors | {f"lm_head.{role}": as_torch(array) for role, array in packed.items()}, file)
    model = load_model(tmp_path / "quantised", dequantise=False)
    ours = dequantise(
        model.skeleton.formats["lm_head.weight"], arrays_of(model, "lm_head.weight"), jnp.float32
    )
    np.testing.assert_allclose(ours, stands_for, rtol=1e-6)
    assert len(model.skeleton.head_places) == 2
    (logits,) = PagedRunner(model).ragged([(0, 0, IDS, len(IDS))])
    assert np.isfinite(logits).all()


def test_weights_stay_quantised_where_a_cpu_has_no_memory_for_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quantise_folder(llama, tmp_path / "quantised", tmp_path / "dense", CASES["awq"])
    assert not load_model(tmp_path / "quantised").skeleton.formats
    monkeypatch.setattr("lmdeploy_jax.converters.load.available_memory", lambda: 100_000)
    assert len(load_model(tmp_path / "quantised").skeleton.formats) == 8
    assert "weights stay quantised" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda formats: formats["layers.0.mlp.down.weight"].update(group="x"),
            "damaged format of layers.0.mlp",
        ),
        (
            lambda formats: formats["layers.0.mlp.down.weight"].update(element="int5"),
            "damaged format of layers.0",
        ),
        (lambda formats: formats["layers.0.mlp.down.weight"].update(more=1), "damaged formats"),
        (
            lambda formats: formats.update({"x.weight": formats["layers.0.mlp.down.weight"]}),
            "damaged format of x",
        ),
        (lambda formats: formats.update({"x.weight": [1]}), "damaged formats"),
    ],
)
def test_damaged_formats_of_a_converted_checkpoint_are_named(
    change: Callable[[dict], None], message: str, llama: Path, tmp_path: Path
) -> None:
    held, _ = both(llama, tmp_path, CASES["awq"])
    formats = {name: asdict(form) for name, form in held.skeleton.formats.items()}
    change(formats)
    out = orbax.save(tmp_path / "out", named_leaves(held), {"formats": formats}, tmp_path / "quantised")
    with pytest.raises(CheckpointError, match=message):
        load_model(out)
