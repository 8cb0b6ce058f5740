"""The language model of a checkpoint that takes images loads as a text model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.errors import CheckpointError
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


def test_quotes_the_part_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["InternVLChatModel"]}))
    with pytest.raises(CheckpointError, match="llm_config is None; it must be the language model's config"):
        read_config(tmp_path)
