"""Embeddings that a batch brings along stand where their tokens' own would."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_jax.converters.load import LoadedModel, load_model
from tests.models.paged import TOKENS, PagedRunner, named_leaves
from tests.oracle import save_checkpoint

IDS = np.random.default_rng(0).integers(3, 257, 70).tolist()
FOREIGN = range(10, 45)  # positions that are no text
PLACEHOLDER = 5


def table_rows(model: LoadedModel) -> np.ndarray:
    """What the tokens of `FOREIGN` enter the first layer as."""
    table = np.asarray(named_leaves(model)["embedding.weight"])
    return table[[IDS[i] for i in FOREIGN]] * np.float32(model.config.embedding_multiplier)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rows_of_the_table_are_the_tokens_own_embeddings(family, tmp_path):
    """Gemma scales what it looks up; what comes along is scaled already."""
    model = load_model(save_checkpoint(family, tmp_path / family))
    (want,) = PagedRunner(model).ragged([(0, 0, IDS, 70)])
    rows = table_rows(model)
    index = np.full(TOKENS, -1, np.int32)
    index[list(FOREIGN)] = np.arange(len(rows))[::-1]
    hidden = [PLACEHOLDER if i in FOREIGN else token for i, token in enumerate(IDS)]
    (got,) = PagedRunner(model).ragged(
        [(0, 0, hidden, 70)], embeddings=rows[None, ::-1], embedding_index=index
    )
    assert np.array_equal(got, want)
    (bare,) = PagedRunner(model).ragged([(0, 0, hidden, 70)])
    assert not np.allclose(bare, want)
