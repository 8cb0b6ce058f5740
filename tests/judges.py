"""Tiny random checkpoints of models that judge texts, and what transformers says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.oracle import CONFIGS, ORACLE, SMALL, save_checkpoint, scramble

SPECIAL = {"no": 250, "yes": 251, "<extra_0>": 252, "?": 253}
OUTPUT_HEADS = ("lm_head.weight", "output.weight")
STEP = SPECIAL["<extra_0>"]
Oracle = Callable[[Sequence[int]], np.ndarray]  # token ids -> f32 [tokens, labels]


def save_tokenizer(folder: Path) -> None:
    """Words w0 to w249, and a few that have a meaning."""
    words = {f"w{i}": i for i in range(250)} | SPECIAL
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def save_classifier(name: str, folder: Path, **options: Any) -> Oracle:
    """transformers' own class over the decoder `name` of `CONFIGS`; options: fields of its config."""
    spec = CONFIGS[name]
    config = getattr(transformers, f"{spec.family}Config")(**SMALL | spec.options | options, dtype="float32")
    torch.manual_seed(5)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    scramble(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)

    @torch.no_grad()
    def oracle(ids: Sequence[int]) -> np.ndarray:
        """Of every beginning of the text, whose last token is what the class looks at."""
        return torch.cat([model(torch.tensor([ids[: i + 1]])).logits for i in range(len(ids))]).numpy()

    return oracle


def save_judge(
    name: str, folder: Path, architecture: str, head: Mapping[str, Sequence[int]], **fields: Any
) -> Oracle:
    """The decoder `name` of `CONFIGS` under random layers of these names and shapes, with ReLUs between."""
    save_checkpoint(name, folder)
    kept = folder / ORACLE if (folder / ORACLE).is_dir() else folder
    decoder = transformers.AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32).eval()
    rng = np.random.default_rng(3)
    layers = {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in head.items()}
    file = folder / "model.safetensors"
    tensors = {
        key: array for key, array in load_file(file).items() if key not in ("lm_head.weight", "output.weight")
    }
    file.unlink()
    save_file(tensors | layers, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]} | fields))
    save_tokenizer(folder)

    @torch.no_grad()
    def oracle(ids: Sequence[int]) -> np.ndarray:
        x = decoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
        for i, (key, array) in enumerate(layers.items()):
            x = x + array if key.endswith("bias") else (np.maximum(x, 0) if i else x) @ array.T
        return x

    return oracle
