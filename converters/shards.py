"""Which files of a folder make up a checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.converters.headers import DOWNLOAD_AGAIN, TensorInfo, parse_json
from lmdeploy_jax.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def find_shards(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The files to read and the index's map from tensor to file name (empty without an index)."""
    if not folder.is_dir():
        what = "is a file, not a checkpoint folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; give the folder that holds config.json and *.safetensors")
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME], {}
    if (folder / INDEX_NAME).exists():
        return _indexed_shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: {_why_no_weights(folder)}")
    return files, {}


def _indexed_shards(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    index = folder / INDEX_NAME
    try:
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    weight_map = parse_json(text, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{index}: weight_map is not a table of tensor -> file name; {DOWNLOAD_AGAIN}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: names shards that are missing: {', '.join(missing)}; download them")
    return [folder / name for name in names], weight_map


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and not set(value) & set("/\\\0")


def check_index(
    tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str], folder: pathlib.Path
) -> None:
    """Every tensor that the index names is in the shard it names."""
    index = folder / INDEX_NAME
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{index}: tensor {name!r} is not in its shard {file}; {DOWNLOAD_AGAIN}")


def _why_no_weights(folder: pathlib.Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "the folder is empty; download the checkpoint into it"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run any code and is refused; convert it where you trust "
            "it, with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    foreign = [name for name in names if name.endswith((".gguf", ".ggml", ".onnx", ".h5", ".msgpack"))]
    if foreign:
        return f"{foreign[0]} is in a format that is not read here; get the model's safetensors checkpoint"
    return f"no *.safetensors file among {', '.join(names[:5])}; give the folder that holds the weights"
