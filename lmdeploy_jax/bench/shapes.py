"""Model shapes for benchmarks: HF configs kept as data in `configs/models`, and the tensors they call for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

import lmdeploy_jax
from lmdeploy_jax.errors import ConfigError

STD = 0.02  # of weights
FOLDER = Path(lmdeploy_jax.__file__).parent / "configs" / "models"


@dataclass(frozen=True)
class Values:
    """What a tensor is filled with: its dtype as safetensors names it, and how a run of values is drawn.

    Words of 4-bit integers are drawn in halves: an I32 has two of what is drawn then.
    """

    dtype: str
    draw: Callable[[np.random.Generator, int], np.ndarray]

    DTYPES: ClassVar[Mapping[str, np.dtype]] = {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F16": np.dtype(np.float16),
        "F32": np.dtype(np.float32),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "I8": np.dtype(np.int8),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
        "U8": np.dtype(np.uint8),
    }

    @property
    def bytes(self) -> int:
        """Of a value."""
        return self.DTYPES[self.dtype].itemsize


NORMAL = Values("BF16", lambda rng, count: _bfloat16(rng.standard_normal(count, np.float32) * STD))
ONES = Values("BF16", lambda rng, count: _bfloat16(np.ones(count, np.float32)))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest, ties to even. Not by `astype`, whose loop for a dtype that is
    not numpy's own keeps other threads from running.
    """
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + (0x7FFF + odd)) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a random checkpoint."""

    name: str
    shape: tuple[int, ...]
    values: Values = NORMAL

    @property
    def bytes(self) -> int:
        return self.values.bytes * math.prod(self.shape)


def names() -> list[str]:
    """The shapes that can be made."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    """The HF config of shape `name`. Raises ConfigError for an unknown one."""
    if name not in names():
        raise ConfigError(f"shape {name!r} is unknown; there are {', '.join(names())}")
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config."""
    part: dict[str, Any] = config.get("llm_config", config)
    return part


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of a checkpoint of Llama, Qwen2, Qwen3, Qwen3-MoE, DeepSeek V2, gpt-oss or InternVL2, in
    the order of the layers.
    """
    if config["model_type"] == "internvl_chat":
        yield from _internvl(config)
        return
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    attention = _latent_attention if config["model_type"] == "deepseek_v2" else _attention
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield Tensor(prefix + "input_layernorm.weight", (hidden,), ONES)
        yield Tensor(prefix + "post_attention_layernorm.weight", (hidden,), ONES)
        yield from attention(config, prefix + "self_attn.")
        mixture = MIXTURES.get(config["model_type"])
        if mixture is not None and layer >= config.get("first_k_dense_replace", 0):
            yield from mixture(config, prefix + "mlp.")
        else:
            yield from _mlp(prefix + "mlp.", hidden, config["intermediate_size"])
    yield Tensor("model.norm.weight", (hidden,), ONES)
    if not config["tie_word_embeddings"]:
        yield Tensor("lm_head.weight", (vocab, hidden))


def _attention(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    hidden, head_dim, kind = config["hidden_size"], config["head_dim"], config["model_type"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Tensor(f"{prefix}{name}.weight", (rows, hidden))
        if kind in ("qwen2", "gpt_oss"):
            yield Tensor(f"{prefix}{name}.bias", (rows,))
    yield Tensor(prefix + "o_proj.weight", (hidden, queries))
    if kind == "gpt_oss":
        yield Tensor(prefix + "o_proj.bias", (hidden,))
        yield Tensor(prefix + "sinks", (config["num_attention_heads"],))
    if kind in ("qwen3", "qwen3_moe"):
        yield Tensor(prefix + "q_norm.weight", (head_dim,), ONES)
        yield Tensor(prefix + "k_norm.weight", (head_dim,), ONES)


def _latent_attention(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    """Queries that no latent comes before."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rotated, value = (config[f"{n}_head_dim"] for n in ("qk_nope", "qk_rope", "v"))
    yield Tensor(prefix + "q_proj.weight", (heads * (nope + rotated), hidden))
    yield Tensor(prefix + "kv_a_proj_with_mqa.weight", (rank + rotated, hidden))
    yield Tensor(prefix + "kv_a_layernorm.weight", (rank,), ONES)
    yield Tensor(prefix + "kv_b_proj.weight", (heads * (nope + value), rank))
    yield Tensor(prefix + "o_proj.weight", (hidden, heads * value))


def _mixture(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    """Routers are drawn as all else is: which experts tokens choose is told by how far apart logits lie."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    count = config["n_routed_experts" if config["model_type"] == "deepseek_v2" else "num_experts"]
    yield Tensor(prefix + "gate.weight", (count, hidden))
    for expert in range(count):
        yield from _mlp(f"{prefix}experts.{expert}.", hidden, inner)
    if shared := config.get("n_shared_experts"):
        yield from _mlp(prefix + "shared_experts.", hidden, shared * inner)


def _stacked_mixture(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    """A layer's experts in two tensors, of weights whose inner axis is the first."""
    count, hidden, inner = (config[n] for n in ("num_local_experts", "hidden_size", "intermediate_size"))
    yield Tensor(prefix + "router.weight", (count, hidden))
    yield Tensor(prefix + "router.bias", (count,))
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        yield Tensor(f"{prefix}experts.{name}", (count, columns, rows))
        yield Tensor(f"{prefix}experts.{name}_bias", (count, rows))


MIXTURES = {"qwen3_moe": _mixture, "deepseek_v2": _mixture, "gpt_oss": _stacked_mixture}


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield Tensor(prefix + "gate_proj.weight", (inner, hidden))
    yield Tensor(prefix + "up_proj.weight", (inner, hidden))
    yield Tensor(prefix + "down_proj.weight", (hidden, inner))


def _internvl(config: dict[str, Any]) -> Iterator[Tensor]:
    """As published: InternViT, the projector, and InternLM2."""
    vision, text = config["vision_config"], config["llm_config"]
    width, side = vision["hidden_size"], vision["image_size"] // vision["patch_size"]
    yield Tensor("vision_model.embeddings.class_embedding", (1, 1, width))
    yield Tensor("vision_model.embeddings.position_embedding", (1, side**2 + 1, width))
    patch = (width, vision["num_channels"], vision["patch_size"], vision["patch_size"])
    yield from _biased("vision_model.embeddings.patch_embedding", patch)
    for layer in range(vision["num_hidden_layers"]):
        yield from _internvit_layer(f"vision_model.encoder.layers.{layer}.", width, vision)
    merged = width * round(1 / config["downsample_ratio"]) ** 2
    yield from _biased("mlp1.0", (merged,), ONES)
    yield from _biased("mlp1.1", (text["hidden_size"], merged))
    yield from _biased("mlp1.3", (text["hidden_size"], text["hidden_size"]))
    yield from _internlm2(text, "language_model.")


def _internvit_layer(prefix: str, width: int, vision: dict[str, Any]) -> Iterator[Tensor]:
    inner = vision["intermediate_size"]
    for name in ("norm1", "norm2"):
        yield from _biased(prefix + name, (width,), ONES)
    for name in ("ls1", "ls2"):
        yield Tensor(prefix + name, (width,))
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (inner, width)}
    for name, shape in {**shapes, "mlp.fc2": (width, inner)}.items():
        yield from _biased(prefix + name, shape)


def _biased(name: str, shape: tuple[int, ...], values: Values = NORMAL) -> Iterator[Tensor]:
    yield Tensor(name + ".weight", shape, values)
    yield Tensor(name + ".bias", shape[:1])


def _internlm2(config: dict[str, Any], prefix: str) -> Iterator[Tensor]:
    hidden, inner, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = config["num_attention_heads"]
    qkv = hidden // heads * (heads + 2 * config["num_key_value_heads"])
    yield Tensor(prefix + "model.tok_embeddings.weight", (vocab, hidden))
    shapes = {"attention.wqkv": (qkv, hidden), "attention.wo": (hidden, hidden)}
    shapes |= {f"feed_forward.w{i}": (inner, hidden) for i in (1, 3)} | {"feed_forward.w2": (hidden, inner)}
    for layer in range(config["num_hidden_layers"]):
        for name in ("attention_norm", "ffn_norm"):
            yield Tensor(f"{prefix}model.layers.{layer}.{name}.weight", (hidden,), ONES)
        for name, shape in shapes.items():
            yield Tensor(f"{prefix}model.layers.{layer}.{name}.weight", shape)
    yield Tensor(prefix + "model.norm.weight", (hidden,), ONES)
    yield Tensor(prefix + "output.weight", (vocab, hidden))
