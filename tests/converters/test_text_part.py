"""The language model of a checkpoint that takes images loads as a text model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.errors import CheckpointError, UnsupportedModelError
from tests.models.paged import PagedRunner
from tests.vision.oracle import hf_model, save_checkpoint

IDS = [5, 17, 99, 3, 64, 31]


@pytest.mark.parametrize("name", ["internvl_hf", "llava", "llava_next"])
@torch.no_grad()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path)
    (ours,) = PagedRunner(load_model(folder)).ragged([(0, 0, IDS, len(IDS))])
    theirs = hf_model(name, folder)(torch.tensor([IDS])).logits[0].numpy()
    assert abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_older_configs_hold_it_among_their_own_fields(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path)
    want = read_config(folder)
    assert want.ropes[0].mrope_section == (2, 3, 3)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    text = {key: value for key, value in raw.pop("text_config").items() if key not in raw}
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    path.write_text(json.dumps(raw | text | old))
    assert read_config(folder) == want


def test_sections_that_miss_the_head_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_vl", tmp_path)
    changes = [
        ({"mrope_section": [2, 3, 4]}, "three numbers that add up to 8"),
        ({"mrope_interleaved": False}, "mrope_interleaved=False is not supported"),
    ]
    for change, said in changes:
        with pytest.raises(UnsupportedModelError, match=said):
            read_config(folder, {"text_config": {"rope_parameters": change}})


def test_quotes_the_part_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["InternVLChatModel"]}))
    with pytest.raises(CheckpointError, match="llm_config is None; it must be the language model's config"):
        read_config(tmp_path)
