"""Changes to a checkpoint folder that change nothing: other spellings, other cuts, more beside it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Change = Callable[[Path, random.Random], None]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JUNK = ("x", 3, None, [1, {"a": None}], {"b": [True]}, 1e-30, "é✓", "torch.float16")
IGNORED = ("_name_or_path", "transformers_version", "unsloth_version", "task_specific_params", "auto_map",
           "initializer_range", "use_cache", "pretraining_tp", "favourite_colour", "_commit")  # fmt: skip
OPTIONAL = ("rope_scaling", "quantization_config", "num_experts", "sliding_window_pattern", "bias")
BY_DEFAULT = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_cache": True,
              "attention_dropout": 0.0, "use_sliding_window": False, "max_window_layers": 28}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(read(path))))


def shuffled(table: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same object with its keys in another order, at every depth."""
    items = list(table.items())
    rng.shuffle(items)
    return {key: shuffled(value, rng) if isinstance(value, dict) else value for key, value in items}


# --- config.json -------------------------------------------------------------------------------------------


def config_in_another_order(folder: Path, rng: random.Random) -> None:
    edit(folder / "config.json", lambda config: shuffled(config, rng))


def config_with_other_white_space(folder: Path, rng: random.Random) -> None:
    text = json.dumps(read(folder / "config.json"), indent=rng.choice([None, 1, 7, "\t"]))
    (folder / "config.json").write_text(rng.choice(["", "\n\n"]) + text + rng.choice(["", "\r\n", "  "]))


def config_with_more_fields(folder: Path, rng: random.Random) -> None:
    more = {name: rng.choice(JUNK) for name in rng.sample(IGNORED, 4)}
    edit(folder / "config.json", lambda config: more | config)


def config_with_null_fields(folder: Path, rng: random.Random) -> None:
    more = dict.fromkeys(rng.sample(OPTIONAL, 2))
    edit(folder / "config.json", lambda config: more | config)


def config_without_defaults(folder: Path, rng: random.Random) -> None:
    def strip(config: dict[str, Any]) -> dict[str, Any]:
        return {
            k: v for k, v in config.items() if k not in BY_DEFAULT or BY_DEFAULT[k] != v or rng.random() < 0.3
        }

    edit(folder / "config.json", strip)


def config_with_the_old_dtype(folder: Path, rng: random.Random) -> None:
    def rename(config: dict[str, Any]) -> dict[str, Any]:
        dtype = config.pop("dtype", "float32")
        return config | {"torch_dtype": rng.choice([dtype, f"torch.{dtype}", None])}

    edit(folder / "config.json", rename)


def config_with_the_old_rope(folder: Path, rng: random.Random) -> None:
    def rename(config: dict[str, Any]) -> dict[str, Any]:
        rope = config.pop("rope_parameters", None)
        if rope is None:
            return config
        if "full_attention" in rope:  # Gemma 3 has one for each kind of layer
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
        scaling = rope | {rng.choice(["type", "rope_type"]): kind}
        return config | {"rope_theta": theta, "rope_scaling": scaling if kind != "default" else None}

    edit(folder / "config.json", rename)


def config_with_other_architectures(folder: Path, rng: random.Random) -> None:
    def rename(config: dict[str, Any]) -> dict[str, Any]:
        (name,) = config.pop("architectures") or [None]
        spellings: list[Any] = [
            {"architectures": value} for value in (None, [], name, ["MyModel", name], [name])
        ]
        return config | rng.choice([{}, *spellings])

    if read(folder / "config.json").get("architectures"):
        edit(folder / "config.json", rename)


# --- Weights -----------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Other tensors in the single file; nothing where another change has cut it into shards."""
    if (folder / WEIGHTS).exists():
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def weights_with_metadata(folder: Path, rng: random.Random) -> None:
    if (folder / WEIGHTS).exists():
        more = {str(i): rng.choice(["", "x" * 1000, "é"]) for i in range(rng.randrange(5))}
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata=more)


def weights_in_shards(folder: Path, rng: random.Random) -> None:
    """With an index or without; where there is one, a tensor may lie in a shard that it does not name."""
    if not (folder / WEIGHTS).exists():
        return
    tensors = load_file(folder / WEIGHTS)
    count = rng.randint(1, 5)
    places = {name: rng.randrange(count) for name in tensors}
    (folder / WEIGHTS).unlink()
    indexed = rng.random() < 0.7
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        mine = {name: tensor for name, tensor in tensors.items() if places[name] == i}
        stale = (
            {name: np.zeros_like(tensors[name]) for name in rng.sample(sorted(tensors), 2)} if indexed else {}
        )
        save_file(stale | mine, folder / file)
    if indexed:
        weight_map = shuffled({name: files[place] for name, place in places.items()}, rng)
        index = {"metadata": rng.choice(JUNK), "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(shuffled(index, rng)))


def weights_without_the_prefix(folder: Path, rng: random.Random) -> None:
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def weights_with_unread_tensors(folder: Path, rng: random.Random) -> None:
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "mtp.fc.weight",
             "model.layers.99.mlp.up_proj.weight", "layers.99.shared_head.norm.weight")  # fmt: skip
    more = {name: np.full((rng.randint(1, 9),), 7.0, np.float32) for name in rng.sample(names, 3)}
    rewrite(folder, lambda tensors: tensors | more)


def weights_with_the_tied_head_again(folder: Path, rng: random.Random) -> None:
    def add(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
        return {"lm_head.weight": embedding} | tensors

    if read(folder / "config.json").get("tie_word_embeddings", True):
        rewrite(folder, add)


def weights_as_wider_floats(folder: Path, rng: random.Random) -> None:
    rewrite(folder, lambda tensors: {name: tensor.astype(np.float64) for name, tensor in tensors.items()})


def header_in_another_order(folder: Path, rng: random.Random) -> None:
    """Entries in any order, and blanks behind them, as the format allows."""
    file = folder / WEIGHTS
    if file.exists():
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(shuffled(header, rng)).encode() + b" " * rng.randrange(4000)
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


# --- Beside them -------------------------------------------------------------------------------------------


def stray_files(folder: Path, rng: random.Random) -> None:
    names = (
        "optimizer.pt",
        "README.md",
        "trainer_state.json",
        "model.gguf",
        "modeling_x.py",
        "pytorch_model.bin",
    )
    for name in rng.sample(names, 3):
        (folder / name).write_bytes(rng.randbytes(50))


def tokenizer_config_with_more(folder: Path, rng: random.Random) -> None:
    more = {
        "name_or_path": rng.choice(JUNK),
        "tokenizer_file": None,
        "sp_model_kwargs": {},
        "added_tokens_decoder": None,
    }
    edit(folder / "tokenizer_config.json", lambda config: shuffled(more | config, rng))


def generation_config_with_more(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        eos = config.get("eos_token_id")
        spelled = {"eos_token_id": [eos]} if isinstance(eos, int) and rng.random() < 0.5 else {}
        return shuffled({"transformers_version": "4.0", "do_sample": None} | config | spelled, rng)

    edit(folder / "generation_config.json", change)


def template_in_the_tokenizer_config(folder: Path, rng: random.Random) -> None:
    file = folder / "chat_template.jinja"
    if file.exists():
        template = file.read_text()
        named = [{"name": "default", "template": template}]
        edit(folder / "tokenizer_config.json", lambda c: c | {"chat_template": rng.choice([template, named])})
        file.unlink()


CHANGES: dict[str, Change] = {
    name: change
    for name, change in globals().items()
    if callable(change)
    and name.split("_")[0] in ("config", "weights", "header", "stray", "tokenizer", "generation", "template")
}
