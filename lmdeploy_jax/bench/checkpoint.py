"""Random checkpoints in HF's layout: config, bfloat16 safetensors, byte-level tokenizer; no downloads.

Speed does not depend on the values of the weights: a random checkpoint of the right shape stands for the
real one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from lmdeploy_jax.bench import shapes
from lmdeploy_jax.bench.shapes import Tensor

SHARD_BYTES = 1 << 30
CHUNK = 4 << 20  # values drawn at once, which bounds the memory of a thread
STD = 0.02
SPECIAL = {"<|bos|>": 256, "<|endoftext|>": 257, "<|pad|>": 258}


def make(name: str, root: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """The folder `root/name` with a random checkpoint of shape `name`, made unless it is there and whole."""
    folder = root / name
    if (folder / "model.safetensors.index.json").exists():
        return folder
    config = shapes.read(name)
    partial = root / f".{name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write_small_files(partial, config)
        _write_weights(partial, list(shapes.tensors(config)), seed, shard_bytes)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_small_files(folder: Path, config: dict[str, Any]) -> None:
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    _write_tokenizer(folder / "tokenizer.json", config["vocab_size"])


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """Bytes as tokens; the ids beyond them are never encoded, but can be decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update(SPECIAL)
    vocab.update((f"w{i}_", i) for i in range(len(vocab), vocab_size))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path), pretty=False)


def _write_weights(folder: Path, tensors: list[Tensor], seed: int, shard_bytes: int) -> None:
    seeds = dict(zip(tensors, np.random.SeedSequence(seed).spawn(len(tensors)), strict=True))
    shards = list(_shards(tensors, shard_bytes))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_write_shard, folder / file, shard, seeds)
            for file, shard in zip(files, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(map(_bytes, tensors))}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        shard.append(tensor)
        if sum(map(_bytes, shard)) >= limit:
            yield shard
            shard = []
    if shard:
        yield shard


def _write_shard(path: Path, tensors: list[Tensor], seeds: dict[Tensor, np.random.SeedSequence]) -> None:
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            _write_values(file, tensor, np.random.Generator(np.random.SFC64(seeds[tensor])))


def _header(tensors: list[Tensor]) -> bytes:
    """Safetensors: 8 bytes of header length, then JSON padded with blanks to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + _bytes(tensor)]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_values(file: BinaryIO, tensor: Tensor, rng: np.random.Generator) -> None:
    left = math.prod(tensor.shape)
    while left:
        count = min(left, CHUNK)
        values = np.ones(count, np.float32) if tensor.ones else rng.standard_normal(count, np.float32) * STD
        file.write(values.astype(ml_dtypes.bfloat16).tobytes())
        left -= count


def _bytes(tensor: Tensor) -> int:
    return 2 * math.prod(tensor.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
