"""tiny-moe's trainer: its mixtures are transformers', and all of it learns; the tokenizer is tiny-chat's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.assets.train import Options, batches, evaluate, loss_of, optimizers, save, step
from lmdeploy_jax.assets.train_models import SHAPES, hidden_states, new_model, tokenizer_of
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.models.mlp_config import MixtureConfig

SMALL = replace(
    SHAPES["tiny-moe"],
    fields={
        **SHAPES["tiny-moe"].fields,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "moe_intermediate_size": 32,
    },
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of(SMALL, seed=0)


@pytest.fixture(scope="module")
def batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return next(batches(tokenizer, Options(Path(), batch_tokens=300)))


def test_a_mixture_of_all_experts_is_that_of_the_chosen_ones(
    tokenizer: Any, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = new_model(SMALL, tokenizer, seed=0)
    plain = SMALL.kind(model.config)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, imbalance = hidden_states(model, batch[0])
        theirs = plain.model(input_ids=batch[0]).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    coefficient = model.config.router_aux_loss_coef
    assert (
        2 * coefficient <= imbalance <= 8 * coefficient
    )  # from even shares of two to one expert's having all


def test_it_learns_and_is_saved_as_published_mixtures_are(
    tokenizer: Any, batch: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model = new_model(SMALL, tokenizer, seed=0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steppers, first = optimizers(model), float(loss_of(model, *batch).detach())
    losses = [step(model, steppers, batch, 3e-3) for _ in range(8)]
    assert losses[-1] < first - 1
    assert all((value != before[name]).any() for name, value in model.named_parameters())
    save(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["num_experts"]) == ("qwen3_moe", 8)  # published checkpoints' names
    mixture = read_config(tmp_path).layers[0].mlp
    assert isinstance(mixture, MixtureConfig)
    assert (mixture.router.experts, mixture.router.per_token) == (8, 2)
    ours, theirs = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, TINY_CHAT))
    assert ours["model"] == theirs["model"]


def test_answers_are_judged_task_by_task(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmdeploy_jax.assets.tasks.TASKS", ("days", "add"))
    monkeypatch.setattr(
        "lmdeploy_jax.assets.train.answers", lambda model, tokenizer, prompts: [""] * len(prompts)
    )
    assert evaluate(torch.nn.Linear(1, 1), tokenizer, 2) == {"days": 0.0, "add": 0.0}
    assert capsys.readouterr().out.count(" -> ''") == 4
