"""Checkpoints as people publish them, with transformers as the oracle of what counts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.errors import CheckpointError
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import hf_logits, save_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen2", tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def plain(tied: Path) -> LoadedModel:
    return load_model(tied)


@pytest.fixture
def published(tied: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Tensors]], Path]:
    """Makes a copy of the checkpoint `tied` with other tensors."""

    def make(change: Callable[[Tensors], Tensors]) -> Path:
        folder = shutil.copytree(tied, tmp_path / "published")
        changed = change(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def assert_same(model: LoadedModel, other: LoadedModel) -> None:
    assert list(named_leaves(model)) == list(named_leaves(other))
    assert model.config == other.config
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, named_leaves(other)[name], err_msg=name)


def assert_as_transformers(model: LoadedModel, folder: Path) -> None:
    ids = list(range(3, 40))
    (ours,) = PagedRunner(model).ragged([(0, 0, ids, len(ids))])
    theirs = hf_logits(folder, ids)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_saved_head_that_differs_from_the_embedding_is_used(published, tmp_path, caplog):
    folder = published(lambda tensors: tensors | {HEAD: tensors[EMBEDDING][::-1].copy()})
    model = load_model(folder)
    assert_as_transformers(model, folder)
    (message,) = warnings(caplog)
    assert f"{HEAD} differs from {EMBEDDING}: the saved head is used" in message
    converted = orbax.save(tmp_path / "converted", named_leaves(model), {}, folder)
    assert_same(load_model(converted), model)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_saved_head_that_equals_the_embedding_costs_nothing(published, plain, caplog, dtype):
    model = load_model(published(lambda tensors: tensors | {HEAD: tensors[EMBEDDING].astype(dtype)}))
    assert_same(model, plain)
    assert HEAD not in named_leaves(model)
    assert not warnings(caplog)


def test_a_head_without_an_embedding_is_both(published, plain):
    assert_same(load_model(published(lambda tensors: tensors | {HEAD: tensors.pop(EMBEDDING)})), plain)


def test_a_head_of_another_shape_is_named(published):
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: shape \[3, 64\], config\.json asks for"):
        load_model(published(lambda tensors: tensors | {HEAD: np.zeros((3, 64), np.float32)}))


def test_an_embedding_is_not_made_from_an_untied_head(published):
    folder = published(lambda tensors: tensors | {HEAD: tensors.pop(EMBEDDING)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing tensor model\.embed_tokens\.weight"):
        load_model(folder)


@pytest.mark.parametrize("head", [HEAD, f"model.{HEAD}"])
def test_names_with_and_without_the_prefix_are_the_same(published, plain, head):
    """A base model's names lack it, as in Qwen3-Embedding; transformers strips and adds it for each name."""

    def strip(tensors: Tensors) -> Tensors:
        stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        return stripped | {head: tensors[EMBEDDING]}

    folder = published(strip)
    model = load_model(folder)
    assert_same(model, plain)
    assert_as_transformers(model, folder)


def test_a_decoder_saved_without_its_head_is_told_how_to_give_embeddings(published, plain):
    folder = published(lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()})
    untied = {"tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match="no output head, so that it can give embeddings but no text"):
        load_model(folder, hf_overrides=untied)
    assert_same(load_model(folder, hf_overrides={"tie_word_embeddings": True}), plain)


def test_one_weight_under_both_names_is_ambiguous(published):
    name = "model.norm.weight"
    with pytest.raises(CheckpointError, match=r"ambiguous tensor (model\.)?norm\.weight"):
        load_model(published(lambda tensors: tensors | {"norm.weight": tensors[name]}))


def test_layers_beyond_the_config_are_left_unread_with_one_line(published, plain, caplog):
    more = (
        "model.layers.2.mlp.up_proj.weight",
        "layers.7.eh_proj.weight",
        "mtp.fc.weight",
        "model.mtp_layers.0.w",
    )
    folder = published(lambda tensors: tensors | dict.fromkeys(more, np.zeros((2, 2), np.float32)))
    assert_same(load_model(folder), plain)
    (message,) = warnings(caplog)
    assert "4 tensors of layers beyond num_hidden_layers=2 are left unread" in message


def test_saved_rotary_tables_are_left_unread(published, plain, caplog):
    names = ("model.rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.cos_cached")
    folder = published(lambda tensors: tensors | dict.fromkeys(names, np.zeros(2, np.float32)))
    assert_same(load_model(folder), plain)
    assert not warnings(caplog)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tied):
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 9999 in config\.json, but"):
        load_model(tied, hf_overrides={"num_hidden_layers": 9999, "layer_types": None})
