"""Phi-3.5-vision through the pipeline, as transformers' Phi-3 answers to its rows."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.engine.test_images import (
    ASK,
    COUNT,
    GREEDY,
    MORE,
    ONE,
    OTHER,
    PLACEHOLDER,
    Open,
    encoded,
    opened,
    save_tokenizer,
)
from tests.oracle import scramble
from tests.vision.oracle import TEXT
from tests.vision.test_parity_others import save_phi3_v

__all__ = ["opened"]


@torch.no_grad()
def test_answers_equal_transformers(tmp_path: Path, opened: Open) -> None:
    """Images are numbered over the conversation, and lie between levels of 8 bits."""
    config = transformers.Phi3Config(**TEXT, sliding_window=None, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    scramble(model)
    model.generation_config.eos_token_id = None
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    features_of = save_phi3_v(tmp_path, tensors, config.to_dict() | {"model_type": "phi3_v"})
    save_tokenizer(tmp_path, {"architectures": ["Phi3VForCausalLM"]})
    pipe = opened(tmp_path)
    for prompt, images in (((ASK, ONE), [ONE]), ((MORE, [ONE, OTHER]), [ONE, OTHER]), (ASK, [])):
        ids = torch.tensor([encoded(pipe, prompt)])
        embeddings = model.get_input_embeddings()(ids)
        if images:
            embeddings[ids == PLACEHOLDER] = features_of(images)
        options = {"max_new_tokens": COUNT, "do_sample": False}
        answer = model.generate(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), **options)
        assert pipe(prompt, GREEDY).token_ids == answer[0].tolist()
