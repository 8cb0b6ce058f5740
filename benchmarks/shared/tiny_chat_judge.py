"""How well tiny-chat, and what is made of it, tells the answers to held-out questions: without an engine."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lmdeploy_jax.assets import TINY_CHAT, tasks
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.lite.layer import Windows, layer_model
from lmdeploy_jax.models.kernels import Kernels
from lmdeploy_jax.text.chat_template import select
from lmdeploy_jax.text.tokenizer import Tokenizer

AT_ONCE = 12  # questions


class Judge:
    """Asks `per_task` questions of each task that are at most `length` tokens long with their answer."""

    def __init__(self, per_task: int, length: int = 192) -> None:
        self._per_task, self._length = per_task, length
        config = load_model(TINY_CHAT).config
        self._layer = layer_model(config, config.layers[0], jnp.dtype("float32"), Kernels())

    @cached_property
    def _questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [questions, length], and which of them are an answer's: it is trained on nothing else."""
        tokenizer = Tokenizer(TINY_CHAT)
        template, rows, answers = select(tokenizer, TINY_CHAT), [], []
        for example in (found for task in tasks.TASKS for found in tasks.held_out(task, self._per_task, 1)):
            tools = list(example.tools) if example.tools else None
            prompt = template.render(list(example.messages), tools=tools, **example.template)
            ids = tokenizer.encode(prompt, add_bos=False)
            whole = [*ids, *tokenizer.encode(example.answer, add_bos=False)]
            if len(whole) <= self._length:
                place = np.arange(self._length)
                rows.append(np.pad(whole, (0, self._length - len(whole))))
                answers.append((place >= len(ids)) & (place < len(whole)))
        return np.stack(rows), np.stack(answers)

    @cached_property
    def _original(self) -> jax.Array:
        return self._chances(TINY_CHAT)

    def judge(self, folder: Path) -> tuple[float, float]:
        """Of a checkpoint that has tiny-chat's shapes: the perplexity of the answers, and how far its chances
        diverge from the original's, in nats a token (Kullback and Leibler's).
        """
        ids, answers = self._questions
        chances = self._original if folder == TINY_CHAT else self._chances(folder)
        told = jnp.take_along_axis(chances, jnp.asarray(ids[answers])[:, None], axis=1)
        apart = (jnp.exp(self._original) * (self._original - chances)).sum(-1).mean()
        return float(jnp.exp(-told.mean())), float(apart)

    def _chances(self, folder: Path) -> jax.Array:
        """Logarithms, before each token of an answer [tokens, V]."""
        model, (ids, answers) = load_model(folder, dtype="float32", dequantise=True), self._questions
        leaves = dict(zip(model.skeleton.specs, model.leaves, strict=True))
        asked = np.roll(answers, -1, axis=1)
        pieces = [slice(first, first + AT_ONCE) for first in range(0, len(ids), AT_ONCE)]
        x = jnp.concatenate([self._hidden(leaves, ids[piece], asked[piece]) for piece in pieces])
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + model.config.norm_eps) * leaves["norm.weight"]
        return jax.nn.log_softmax(x @ leaves["embedding.weight"].T)

    def _hidden(self, leaves: dict[str, jax.Array], ids: np.ndarray, asked: np.ndarray) -> jax.Array:
        """The residual stream at the tokens that are `asked`; fewer questions than usual are padded."""
        ids = np.pad(ids, ((0, AT_ONCE - len(ids)), (0, 0)))
        x = leaves["embedding.weight"][ids.reshape(-1)]
        for i in range(len([name for name in leaves if name.endswith("mlp_norm.weight")])):
            layer = {name: leaves[f"layers.{i}.{name}"] for name in self._layer.dtypes}
            x, _ = self._layer.run(layer, x, Windows(*ids.shape))
        return x.reshape(*ids.shape, -1)[: len(asked)][asked]
