"""Random checkpoints in HF's layout: config, safetensors, byte-level tokenizer; no downloads.

Speed does not depend on the values of the weights: a random checkpoint of the right shape stands for the
real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmdeploy_jax.bench import quantised, shapes
from lmdeploy_jax.bench.shapes import Tensor
from lmdeploy_jax.errors import ConfigError

SHARD_BYTES = 1 << 30
CHUNK = 4 << 20  # values drawn at once, which bounds the memory of a thread
SPECIAL = {"<|bos|>": 256, "<|endoftext|>": 257, "<|pad|>": 258}
DENSE = re.compile(r"\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight$")
OF_IMAGES = {"<img>": 259, "</img>": 260, "<IMG_CONTEXT>": 261}


def make(
    name: str,
    root: Path,
    *,
    model_format: str | None = None,
    block_scales: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """The folder `root/name` with a random checkpoint of shape `name`, made unless it is there and whole.

    model_format: of the linear layers' weights, in bfloat16 without one; the folder's name ends with it.
    block_scales: those of fp8 are of 128x128 blocks, not of a tensor. Raises ConfigError for an unknown shape
    or format.
    """
    form = quantised.find(model_format, block_scales=block_scales)
    folder = root / _folder_name(name, model_format, block_scales)
    if (folder / "model.safetensors.index.json").exists():
        return folder
    config = shapes.read(name)
    tensors = shapes.tensors(config)
    if form is not None:
        tensors = quantised.quantise(tensors, form)
        config["quantization_config"] = form.settings
    partial = root / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write_small_files(partial, config)
        _write_weights(partial, list(tensors), seed, shard_bytes)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def make_unwritten(
    name: str, root: Path, *, model_format: str | None = None, block_scales: bool = False
) -> Path:
    """The same, its name followed by `-random`, without the weights, which the devices make as it is loaded.

    Raises ConfigError for an unknown format, and for shapes whose quantised weights are not all of dense
    attention and MLPs.
    """
    from lmdeploy_jax.converters import random_weights  # JAX is imported here

    form, config = quantised.find(model_format, block_scales=block_scales), shapes.read(name)
    weights = [t for t in shapes.tensors(config) if form is not None and form.weights.fullmatch(t.name)]
    if form is not None:
        if not weights or not all(DENSE.search(tensor.name) for tensor in weights):
            raise ConfigError(f"{name}: --random quantises dense models alone; leave it out")
        config["quantization_config"] = form.settings
    held = {} if form is None else {tensor.shape[-1]: form.held(tensor.shape[-1]) for tensor in weights}
    folder = root / f"{_folder_name(name, model_format, block_scales)}-random"
    folder.mkdir(parents=True, exist_ok=True)
    _write_small_files(folder, config)
    random_weights.declare(folder, "bfloat16", held)
    return folder


def _folder_name(name: str, model_format: str | None, block_scales: bool) -> str:
    return "-".join([name, *([model_format] if model_format else []), *["blocks"] * block_scales])


def _write_small_files(folder: Path, config: dict[str, Any]) -> None:
    text = shapes.text_config(config)
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
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
    special = SPECIAL if text is config else {**SPECIAL, **OF_IMAGES}
    _write_tokenizer(folder / "tokenizer.json", text["vocab_size"], special)


def _write_tokenizer(path: Path, vocab_size: int, special: dict[str, int]) -> None:
    """Bytes as tokens; the ids beyond them are never encoded, but can be decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab.update(special)
    vocab.update((f"w{i}_", i) for i in range(len(vocab), vocab_size))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
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
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        shard.append(tensor)
        if sum(tensor.bytes for tensor in shard) >= limit:
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
        span = [offset, offset + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.values.dtype, "shape": tensor.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_values(file: BinaryIO, tensor: Tensor, rng: np.random.Generator) -> None:
    left = tensor.bytes
    while left:
        count = max(1, min(left // tensor.values.bytes, CHUNK))
        data = tensor.values.draw(rng, count).tobytes()
        file.write(data)
        left -= len(data)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
