"""Damage to a checkpoint folder: values, headers, names, shapes and files that nobody should trust."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters.orbax import MANIFEST
from tests.converters.harmless import INDEX, WEIGHTS, Change, read, weights_in_shards


class Raw(float):
    """A number that JSON writers refuse or shorten, written as it stands."""

    def __new__(cls, text: str) -> Raw:
        made = super().__new__(cls, 0.0)
        made.text = text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 1e-300, 1e308, -0.5, 0.5, Raw("1" * 400), Raw("1" * 5000),
           Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"))  # fmt: skip
TEXTS = ("", "x", "128", "default", "yarn", "bfloat16", "y" * 100_000, "\x00", "../x")
LISTS = ([], [[]], [1, 2], ["x"], nested(300), list(range(2000)), {}, {"a": 1}, {"type": "linear"})
VALUES = (*NUMBERS, *TEXTS, *LISTS, None, True, False)
ATTENTION = ("attention_factor", "mscale", "mscale_all_dim")
ROPE_KEYS = {
    "default": ("partial_rotary_factor",),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
             "original_max_position_embeddings"),
}  # fmt: skip
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "rms_norm_eps": (1e-5, 0.1),
    "rope_theta": (50.0, 1e6),
    "hidden_act": ("gelu", "gelu_new", "silu", "gelu_pytorch_tanh", "relu"),
    "hidden_activation": ("gelu", "silu", None),
    "tie_word_embeddings": (True, False),
    "sliding_window": (None, 5, 24),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 28),
    "layer_types": (["full_attention"] * 2, ["sliding_attention", "full_attention"], None),
    "num_hidden_layers": (1, 2, 3),
    "num_attention_heads": (2, 4, 8),
    "num_key_value_heads": (1, 2, 4, None),
    "head_dim": (16, 32, None),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "query_pre_attn_scalar": (16, 256),
    "attn_logit_softcapping": (5.0, None),
    "final_logit_softcapping": (3.0, None),
    "max_position_embeddings": (32, 64, 4096),
    "original_max_position_embeddings": (32, 128),
    "partial_rotary_factor": (0.5, 1.0),
    "sliding_window_pattern": (2, 3),
    "rope_local_base_freq": (50.0,),
    "attention_multiplier": (0.5,),
    "logits_scaling": (2.0,),
    "vocab_size": (257, 200, 300),
    "intermediate_size": (96, 48),
    "attention_dropout": (0.5,),
    "use_bidirectional_attention": (True, False),
    "pad_token_id": (0, -1, 300),
    "is_decoder": (True, False),
    "no_rope_layers": ([1, 0], None),
}
BYTES = (
    *(
        b"",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b"{}{}",
    ),
    *(b"[" * 100_000, b'{"a":' * 3000, b"\x00" * 64, b'{"a": ' + b"9" * 5000 + b"}"),
)
TEMPLATES = (
    *(
        "{% for x in %}",
        "{{",
        "{% endif %}",
        "{{ x | nofilter }}",
        "{% include 'x' %}",
        "\x00",
        "{%- -%}" * 9,
    ),
    *("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ " + "(" * 5000, "{% if x %}" * 500),
)
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
TOKEN_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below an object or list."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, below in pairs for found in ((*path, key), *places(below, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def drop(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def spoil(document: Any, rng: random.Random) -> None:
    """One value of a JSON document becomes another, or goes; top and depth are equally likely."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(document):
        by_depth.setdefault(len(path), []).append(path)
    if by_depth:
        path = rng.choice(by_depth[rng.choice(sorted(by_depth))])
        drop(document, path) if rng.random() < 0.15 else put(document, path, rng.choice(VALUES))


def spoil_file(file: Path, rng: random.Random) -> None:
    document = read(file)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        spoil(document, rng)
    file.write_text(json.dumps(document))


def flip(file: Path, rng: random.Random, most: int) -> None:
    """Bytes among the first `most` are changed, taken out or put in, or the file is cut off."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(content), most))
        content[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    cut = rng.randrange(len(content)) if rng.random() < 0.3 else len(content)
    file.write_bytes(bytes(content[:cut]))


# --- Damage ------------------------------------------------------------------------------------------------


def config_values(folder: Path, rng: random.Random) -> None:
    spoil_file(folder / "config.json", rng)


def rope_values(folder: Path, rng: random.Random) -> None:
    config = read(folder / "config.json")
    name = rng.choice(["rope_scaling", "rope_parameters"])
    kind = rng.choice(["linear", "dynamic", "llama3", "yarn", "longrope", "default", "su", "spiral"])
    keys = ("factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
            "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "short_factor", "type",
            "long_factor", "truncate", "partial_rotary_factor")  # fmt: skip
    config[name] = {"rope_type": kind, "factor": 2.0} | {
        key: rng.choice(rng.choice([NUMBERS, VALUES])) for key in rng.sample(keys, 3)
    }
    (folder / "config.json").write_text(json.dumps(config))


def plausible_fields(folder: Path, rng: random.Random) -> None:
    """Fields that mean something in some family, with values that mean something: right or refused."""
    config = read(folder / "config.json")
    names = sorted(name for name in PLAUSIBLE if name in config or rng.random() < 0.1)
    more = {name: rng.choice(PLAUSIBLE[name]) for name in rng.sample(names, rng.randint(1, 3))}
    (folder / "config.json").write_text(json.dumps(config | more))


def plausible_rope(folder: Path, rng: random.Random) -> None:
    config = read(folder / "config.json")
    kind = rng.choice(sorted(ROPE_KEYS))
    keys = [key for key in ROPE_KEYS[kind] if rng.random() < 0.9]
    mild, wild = (0.5, 1.0, 2.0), (0.5, 1.0, 2.0, 4.0, 8, 64, 33)  # large attention factors magnify rounding
    rope = {key: rng.choice(mild if key in ATTENTION else wild) for key in keys}
    # transformers passes over the old spelling in Gemma 3's configs, which is its own mistake
    spelled = {"rope_type" if "gemma3" in config["model_type"] else rng.choice(["rope_type", "type"]): kind}
    theta = {"rope_theta": rng.choice([100.0, 10000, 5e5])}
    name = rng.choice(["rope_scaling", "rope_parameters"])
    if rng.random() < 0.7:
        config.pop("rope_parameters", None)
    inside = theta if rng.random() < 0.5 else {}
    (folder / "config.json").write_text(json.dumps(config | theta | {name: rope | spelled | inside}))


def token_values(folder: Path, rng: random.Random) -> None:
    spoil_file(folder / rng.choice(JSON_FILES[1:]), rng)


def token_files(folder: Path, rng: random.Random) -> None:
    made = {
        rng.choice(["bos_token", "additional_special_tokens", "<x>", "7"]): rng.choice(VALUES)
        for _ in range(2)
    }
    (folder / rng.choice(TOKEN_FILES)).write_text(json.dumps(rng.choice([made, rng.choice(VALUES)])))


def added_tokens(folder: Path, rng: random.Random) -> None:
    config = read(folder / "tokenizer_config.json")
    key = rng.choice(["0", "2551", "99999", "-1", "x", str(2**32), str(10**30), ""])
    token = rng.choice(
        [{"content": rng.choice(["<x>", "", " ", 3, None]), "special": rng.choice(VALUES)}, *VALUES]
    )
    config["added_tokens_decoder"] = {key: token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def eos_ids(folder: Path, rng: random.Random) -> None:
    ids: Any = rng.choice([rng.choice(VALUES), [rng.choice(VALUES) for _ in range(3)], {"a": 2}])
    for name in rng.sample(["config.json", "generation_config.json"], rng.randint(1, 2)):
        (folder / name).write_text(json.dumps(read(folder / name) | {"eos_token_id": ids}))


def json_bytes(folder: Path, rng: random.Random) -> None:
    name = rng.choice(JSON_FILES + TOKEN_FILES)
    if (folder / name).exists() and rng.random() < 0.5:
        flip(folder / name, rng, most=1 << 30)
    else:
        (folder / name).write_bytes(rng.choice(BYTES))


def template_text(folder: Path, rng: random.Random) -> None:
    (folder / "chat_template.jinja").write_text(rng.choice(TEMPLATES))


def header_values(folder: Path, rng: random.Random) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.randint(1, 3)):
        spoil(header, rng)
    text = json.dumps(header).encode()
    wrong = rng.choice([len(text)] * 4 + [0, 1, len(text) + 9, 2**63, 2**64 - 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", wrong) + text + content[8 + length :])


def header_bytes(folder: Path, rng: random.Random) -> None:
    flip(folder / WEIGHTS, rng, most=rng.choice([8, 4000]))


def tensor_names(folder: Path, rng: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name in rng.sample(sorted(tensors), 2):
        far = name.replace(".0.", f".{10**30}.")
        others = ["x", "", "model.", "model.layers.-1.w", "lm_head.weight", far]
        new = rng.choice([*others, name + ".", name.upper(), f"model.{name}", f"visual.{name}"])
        kept = tensors if rng.random() < 0.5 else {k: v for k, v in tensors.items() if k != name}
        tensors = kept | ({new: tensors[name].copy()} if rng.random() < 0.8 else {})
    save_file(tensors, folder / WEIGHTS)


def tensor_shapes(folder: Path, rng: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    old = tensors[name].astype(np.float32)
    changed = [
        old.T,
        old.reshape(-1),
        old[None],
        old[:-1],
        np.zeros((), np.float32),
        np.zeros((0, 4), np.float32),
    ]
    kinds = [old.astype(kind) for kind in (np.int8, np.uint8, np.bool_, np.int64, np.float16, np.float64)]
    tensors[name] = np.ascontiguousarray(rng.choice(changed + kinds))
    save_file(tensors, folder / WEIGHTS)


def index_values(folder: Path, rng: random.Random) -> None:
    weights_in_shards(folder, rng)
    if not (folder / INDEX).exists():
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        rng.choice([(folder / names[0]).unlink, lambda: (folder / INDEX).write_bytes(rng.choice(BYTES))])()
    elif rng.random() < 0.8:
        spoil_file(folder / INDEX, rng)
    else:
        (folder / INDEX).write_bytes(rng.choice(BYTES))


def files_of_another_kind(folder: Path, rng: random.Random) -> None:
    name = rng.choice([*JSON_FILES, WEIGHTS, "chat_template.jinja", MANIFEST])
    (folder / name).unlink(missing_ok=True)
    rng.choice([
        lambda: (folder / name).mkdir(),
        lambda: os.mkfifo(folder / name),
        lambda: (folder / name).symlink_to(name),
        lambda: (folder / name).symlink_to("/dev/zero"),
        lambda: (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        lambda: None,
    ])()  # fmt: skip


def converted_files(folder: Path, rng: random.Random) -> None:
    """Damage to a converted checkpoint: its manifest, an array's description, an array's bytes."""
    weights = sorted(path for path in (folder / "weights").iterdir() if (path / ".zarray").exists())
    weight = rng.choice(weights)
    chunk = next(file for file in weight.iterdir() if file.name != ".zarray")
    described = rng.choice(
        [folder / MANIFEST, folder / MANIFEST, weight / ".zarray", folder / "weights" / "_METADATA"]
    )
    rng.choice([
        lambda: spoil_file(described, rng),
        lambda: spoil_file(described, rng),
        lambda: flip(described, rng, most=1 << 30),
        lambda: described.write_bytes(rng.choice(BYTES)),
        lambda: chunk.write_bytes(chunk.read_bytes()[: -rng.randint(1, 9)]),
        chunk.unlink,
        lambda: shutil.rmtree(weight),
        lambda: config_values(folder, rng),
    ])()  # fmt: skip


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (
        config_values, plausible_fields, plausible_rope, rope_values, token_values, token_files, added_tokens,
        eos_ids, json_bytes, template_text, header_values, header_bytes, tensor_names, tensor_shapes,
        index_values, files_of_another_kind,
    )
}  # fmt: skip
