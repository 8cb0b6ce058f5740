"""Checkpoints as people publish them: what they hold besides, or other than, what their config.json says.

The rule is that of transformers: what a checkpoint holds goes before what its config says of it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmdeploy_jax.converters.keytable import PREFIX, Rule, find_tensor
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.models.config import DecoderConfig

log = logging.getLogger("lmdeploy_jax")
EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"
COMPARED_BYTES = 64 << 20  # of each of the two weights at a time
LAYER = re.compile(r"(?:model\.)?(?:layers\.(\d{1,9})|mtp\w*)\..*")


def names_read(reader: TensorReader, num_layers: int) -> list[str]:
    """The names of a checkpoint's tensors without those of layers that its config does not count.

    Such layers predict several tokens ahead in training; they are left unread, with one line in the log.
    Raises CheckpointError where there are more layers than tensors: a config that nothing can fit.
    """
    names = reader.names()
    if num_layers > len(names):
        raise CheckpointError(
            f"{reader.folder}: num_hidden_layers is {num_layers} in config.json, but the checkpoint holds "
            f"only {len(names)} tensors"
        )
    extra = {name: None for name in names if _is_extra(name, num_layers)}
    if extra:
        log.warning(
            "%s: %d tensors of layers beyond num_hidden_layers=%d are left unread, the first of them %s",
            reader.folder, len(extra), num_layers, next(iter(extra)),
        )  # fmt: skip
    return [name for name in names if name not in extra]


def _is_extra(name: str, num_layers: int) -> bool:
    match = LAYER.fullmatch(name)
    return match is not None and (match[1] is None or int(match[1]) >= num_layers)


def settle_head(
    config: DecoderConfig,
    rules: Sequence[Rule],
    reader: TensorReader,
    names: Sequence[str],
    dtype: np.dtype,
) -> tuple[DecoderConfig, tuple[Rule, ...]]:
    """The config and the rules by which a checkpoint's embedding and head are read, as in transformers.

    Tied by the config: a saved head that differs from the embedding as `dtype` is kept, with a warning; one
    that equals it is left unread; one without an embedding beside it is both.
    """
    if not config.tie_embeddings:
        _check_head(rules, reader, names)
        return config, tuple(rules)
    embedding, head = find_tensor(rules, names, EMBEDDING), find_tensor(rules, names, HEAD)
    if head is None:
        return config, tuple(rules)
    if embedding is None:
        return config, _retarget(rules, EMBEDDING)
    if _are_alike(reader, embedding, head, dtype):
        return config, _retarget(rules, None)
    log.warning(
        "%s: config.json ties the output head to the embedding, but %s differs from %s: the saved head is "
        'used. Set "tie_word_embeddings": false in config.json to silence this.',
        reader.folder, head, embedding,
    )  # fmt: skip
    return replace(config, tie_embeddings=False), tuple(rules)


def _check_head(rules: Sequence[Rule], reader: TensorReader, names: Sequence[str]) -> None:
    """A decoder that was saved without its head can still give embeddings: say how."""
    saved_alone = not any(name.startswith(PREFIX) for name in names)
    if saved_alone and find_tensor(rules, names, EMBEDDING) and not find_tensor(rules, names, HEAD):
        raise CheckpointError(
            f"{reader.folder}: the checkpoint has no output head, so that it can give embeddings but no "
            'text; for embeddings alone, load it with hf_overrides={"tie_word_embeddings": true}'
        )


def _retarget(rules: Sequence[Rule], target: str | None) -> tuple[Rule, ...]:
    return tuple(replace(rule, target=target) if rule.target == HEAD else rule for rule in rules)


def _are_alike(reader: TensorReader, one: str, other: str, dtype: np.dtype) -> bool:
    """Whether two tensors are the same weight, compared piece by piece up to the first difference."""
    shape = reader.info(one).shape
    if not shape or reader.info(other).shape != shape:
        return False
    rows = max(1, COMPARED_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    pieces = (slice(first, first + rows) for first in range(0, shape[0], rows))
    return all(
        np.array_equal(_bytes(reader, one, piece, dtype), _bytes(reader, other, piece, dtype))
        for piece in pieces
    )


def _bytes(reader: TensorReader, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
    piece = reader.read(name, (rows,)).astype(dtype, copy=False)
    return np.ascontiguousarray(piece).view(np.uint8)
