"""The oracle of model tests: tiny random checkpoints that HuggingFace transformers itself saves and runs.

`save_checkpoint(name, folder)` writes one of `CONFIGS`; `hf_logits` and `hf_greedy` run it in float32.
Weights are drawn wide, norms and biases too, so that a feature left out changes the logits visibly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

ORACLE = "oracle"  # subfolder with the checkpoint that transformers runs, where the tested one is not its own
SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Spec:
    """A transformers class's prefix, what its config gets besides `SMALL`, a rewriting of what it saves."""

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], None] | None = None


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _yarn(**settings: Any) -> dict[str, Any]:
    return _rope("yarn", factor=4.0, original_max_position_embeddings=128, **settings)


def _longrope(half: int, **settings: Any) -> dict[str, Any]:
    short, long = [1.0 + 0.1 * i for i in range(half)], [2.0 + i for i in range(half)]
    return _rope("longrope", short_factor=short, long_factor=long, **settings)


LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
DYNAMIC = {"max_position_embeddings": 64, **_rope("dynamic", factor=2.0)}
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 256}
HYBRID = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.7,
    "attention_multiplier": 0.1,
}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 12, "mamba_chunk_size": 16}
FALCON = {
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.6,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "key_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 1.1, 0.8, 1.2, 0.9],
    "mlp_multipliers": [1.4, 0.6],
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 24,
    "vocab_size_per_layer_input": 257,
    "layer_types": ["sliding_attention", "full_attention"],
}
MROPE = _rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True)
BIAS = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}


Tensors = dict[str, np.ndarray]


def _rename(path: Path, rename: Callable[[Tensors], Tensors], config: Mapping[str, Any]) -> None:
    """Makes `path` a checkpoint of renamed tensors and keeps what transformers saved in its subfolder."""
    kept = path / ORACLE
    kept.mkdir()
    for file in list(path.glob("*.json")) + list(path.glob("*.safetensors")):
        shutil.move(file, kept / file.name)
    save_file(rename(load_file(kept / "model.safetensors")), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


def _internlm3(path: Path) -> None:
    """The published config: transformers runs InternLM3 as a Llama and renames its two bias fields."""
    config = json.loads((path / "config.json").read_text())
    names = {"qkv_bias": config.pop("attention_bias"), "bias": config.pop("mlp_bias")}
    _rename(path, dict, config | names | {"architectures": ["InternLM3ForCausalLM"]})


def _mimo(path: Path) -> None:
    """The published config, and a layer that predicts further."""
    config = json.loads((path / "config.json").read_text())
    own = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}

    def rename(tensors: Tensors) -> Tensors:
        return tensors | {"model.mtp_layers.0.input_proj.weight": np.zeros((64, 128), np.float32)}

    _rename(path, rename, config | own | {"num_nextn_predict_layers": 1})


def _internlm2(path: Path) -> None:
    """InternLM2's published layout: per KV head its query heads, key, value; own names, old RoPE fields."""
    config = json.loads((path / "config.json").read_text())
    rope = config["rope_parameters"]
    scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if "factor" in rope else None
    heads, kv_heads, size = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def rename(tensors: Tensors) -> Tensors:
        renamed = {}
        for name, value in tensors.items():
            if "q_proj" in name:
                parts = [tensors[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
                rest = parts[0].shape[1:]
                grouped = [p.reshape(kv_heads, -1, size, *rest) for p in parts]
                value = np.concatenate(grouped, axis=1).reshape((heads + 2 * kv_heads) * size, *rest)
            if not any(part in name for part in ("k_proj", "v_proj")):
                renamed[_internlm2_name(name)] = np.ascontiguousarray(value)
        return renamed

    published = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": config.pop("attention_bias"),
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rope_scaling": scaling,
    }
    _rename(path, rename, config | published)


def _internlm2_name(name: str) -> str:
    changes = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


CONFIGS: Mapping[str, Spec] = {
    "llama": Spec("Llama"),
    "llama_mha": Spec("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_mqa": Spec("Llama", {"num_key_value_heads": 1, "vocab_size": 503}),
    "llama_llama3": Spec("Llama", LLAMA3),
    "llama_linear": Spec("Llama", _rope("linear", factor=4.0)),
    "llama_dynamic": Spec("Llama", DYNAMIC),
    "llama_yarn": Spec("Llama", _yarn()),
    "llama_yarn_mscale": Spec("Llama", _yarn(mscale=0.7, mscale_all_dim=1.3, beta_fast=16, truncate=False)),
    "llama_head80": Spec("Llama", {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama_head96": Spec(
        "Llama", {"hidden_size": 96, "head_dim": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    ),
    "llama_bias": Spec("Llama", BIAS | {"vocab_size": 509}),
    "yi": Spec("Llama", {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, **_rope("default", rope_theta=5e6)}),
    "mistral": Spec("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral_window": Spec("Mistral", {"sliding_window": 24}),
    "qwen2": Spec("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": Spec("Qwen2", WINDOW | {"num_hidden_layers": 3} | _yarn()),
    "qwen3": Spec("Qwen3", {"head_dim": 32}),
    "qwen3_everything": Spec(
        "Qwen3", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True, **WINDOW, **DYNAMIC}
    ),
    "internlm2": Spec("Llama", rewrite=_internlm2),
    "internlm2_dynamic": Spec("Llama", {"attention_bias": True, **DYNAMIC}, _internlm2),
    "internlm3": Spec("InternLM3", {"head_dim": 32}, _internlm3),
    "phi3": Spec("Phi3", {"sliding_window": None}),
    "phi3_longrope": Spec(
        "Phi3",
        {"original_max_position_embeddings": 64, "sliding_window": 48}
        | _longrope(6, partial_rotary_factor=0.75),
    ),
    "granite": Spec(
        "Granite",
        {**GRANITE, "attention_bias": True},
    ),
    "smollm3": Spec("SmolLM3", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "seed_oss": Spec("SeedOss", {"head_dim": 32}),
    "gemma": Spec("Gemma", {"head_dim": 32}),
    "gemma2": Spec("Gemma2", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 20}),
    "gemma3": Spec(
        "Gemma3Text",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "gemma4": Spec(
        "Gemma4Text",
        GEMMA4
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4_moe": Spec(
        "Gemma4Text",
        GEMMA4
        | {
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    "llama4": Spec(
        "Llama4Text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size": 48,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 64,
            "interleave_moe_layer_step": 2,
            "floor_scale": 16,
            "attn_scale": 0.5,
        },
    ),
    "mixtral": Spec("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": Spec(
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": Spec(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_next": Spec("Qwen3Next", HYBRID | LINEAR | EXPERTS | {"mlp_only_layers": [1]}),
    "qwen3_5": Spec("Qwen3_5Text", HYBRID | LINEAR | MROPE | {"attention_bias": True}),
    "qwen3_5_moe": Spec("Qwen3_5MoeText", HYBRID | LINEAR | EXPERTS | MROPE),
    "glm4_moe": Spec("Glm4Moe", SIGMOID | {"attention_bias": True, "use_qk_norm": True}),
    "minimax_m2": Spec(
        "MiniMaxM2",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 32}
        | _rope("default", partial_rotary_factor=0.5),
    ),
    "gpt_oss": Spec(
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "head_dim": 16}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | _yarn(truncate=False),
    ),
    "phimoe": Spec(
        "Phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "lm_head_bias": True,
            "attention_bias": True,
            "router_jitter_noise": 0.3,
        },
    ),
    "ernie4_5": Spec("Ernie4_5", {"head_dim": 32, "use_bias": True}),
    "ernie4_5_moe": Spec(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": False,
        },
    ),
    "hunyuan": Spec("HunYuanDenseV1", {"head_dim": 32, **_rope("dynamic", alpha=100.0, factor=1.0)}),
    "hunyuan_moe": Spec("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    "glm": Spec("Glm", {"head_dim": 32, "attention_bias": True}),
    "glm4": Spec("Glm4", {"head_dim": 16, "attention_bias": True}),
    "olmo2": Spec("Olmo2"),
    "olmo3": Spec(
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": 24}
        | {"rope_parameters": {"full_attention": _yarn()["rope_parameters"]}},
    ),
    "olmoe": Spec("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "flex_olmo": Spec("FlexOlmo", {"num_experts": 6, "num_experts_per_tok": 2}),
    "cohere": Spec("Cohere", {"logit_scale": 0.3, "attention_bias": True}),
    "cohere_qk_norm": Spec("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2_moe": Spec(
        "Cohere2Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 80,
            "sliding_window": 24,
            "sliding_window_pattern": 2,
            "logit_scale": 0.3,
        },
    ),
    "exaone_moe": Spec(
        "ExaoneMoe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "minicpm3": Spec("MiniCPM3", LATENT | {"scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 24}),
    "mimo": Spec("Qwen2", {"head_dim": 16}, _mimo),
    "cohere2": Spec("Cohere2", {"logit_scale": 0.3, "sliding_window": 24, "num_hidden_layers": 4}),
    "exaone4": Spec("Exaone4", {"sliding_window": 24, "sliding_window_pattern": 4, "num_hidden_layers": 4}),
    "ministral3": Spec("Ministral3", {"head_dim": 16} | _yarn(llama_4_scaling_beta=0.5, mscale=1.0)),
    "starcoder2": Spec("Starcoder2", {"sliding_window": None}),
    "apertus": Spec("Apertus", {"rope_parameters": LLAMA3["rope_parameters"]}),
    "arcee": Spec("Arcee", {"mlp_bias": True}),
    "deepseek_v2": Spec(
        "DeepseekV2",
        {**SIGMOID, **LATENT, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "deepseek_v3": Spec(
        "DeepseekV3", SIGMOID | LATENT | {"attention_bias": True} | _yarn(mscale=0.7, mscale_all_dim=1.3)
    ),
    "dots1": Spec("Dots1", {**SIGMOID, "norm_topk_prob": True, "sliding_window": 24, "max_window_layers": 1}),
    "solar_open": Spec("SolarOpen", {**SIGMOID, "head_dim": 16, "attention_bias": True}),
    "hy_v3": Spec(
        "HYV3", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    ),
    "granite_moe_shared": Spec(
        "GraniteMoeShared",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            **GRANITE,
        },
    ),
    "granite_moe": Spec("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v32": Spec("DeepseekV32", SIGMOID | LATENT | INDEX | {"mlp_layer_types": ["dense", "sparse"]}),
    "glm_moe_dsa": Spec(
        "GlmMoeDsa",
        {**SIGMOID, **LATENT, **INDEX, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "glm4_moe_lite": Spec(
        "Glm4MoeLite",
        {**SIGMOID, **LATENT, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "granite_hybrid": Spec(
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            "position_embedding_type": "nope",
            **BAMBA,
            **GRANITE,
        },
    ),
    "granite_hybrid_dense": Spec(
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 72,
            "position_embedding_type": "rope",
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            **BAMBA,
        },
    ),
    "nemotron_h": Spec(
        "NemotronH",
        {
            "layers_block_type": ["mlp", "mamba", "attention", "mamba", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 12,
            "n_groups": 4,
            "chunk_size": 16,
            "head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 24,
        },
    ),
    "falcon_h1": Spec("FalconH1", {**BAMBA, "mamba_d_ssm": 128, **FALCON}),
    "falcon_h1_norm": Spec("FalconH1", {**BAMBA, "mamba_d_ssm": 128, "mamba_rms_norm": True}),
    "lfm2": Spec("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "lfm2_moe": Spec(
        "Lfm2Moe",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.3,
            "conv_bias": True,
        },
    ),
    "internlm3_dynamic": Spec("InternLM3", {"head_dim": 16, **BIAS, **DYNAMIC}, _internlm3),
}
"""Every feature alone and several together."""


def save_checkpoint(name: str, folder: str | Path) -> Path:
    """Saves the checkpoint `name` of `CONFIGS` in a folder, the same weights every time; returns `folder`."""
    spec, path = CONFIGS[name], Path(folder)
    if not hasattr(transformers, f"{spec.family}Config"):
        pytest.skip(f"transformers {transformers.__version__} does not know {spec.family}")
    config = getattr(transformers, f"{spec.family}Config")(**SMALL | spec.options, dtype="float32")
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    scramble(model)
    model.save_pretrained(path)
    if spec.rewrite is not None:
        spec.rewrite(path)
    return path


@torch.no_grad()
def scramble(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name in model.state_dict():  # saved, as the biases of a router's choice are
            buffer.add_(0.3 * torch.randn_like(buffer))


def _load(folder: str | Path) -> Any:
    path = Path(folder)
    path = path / ORACLE if (path / ORACLE).is_dir() else path
    # Loaded anew each time: dynamic RoPE keeps the longest sequence that a model has seen.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.no_grad()
def hf_logits(folder: str | Path, ids: Sequence[int], prompt: int | None = None) -> np.ndarray:
    """Logits f32 [len(ids), V]: the first `prompt` ids (default: all) in one pass, then one by one."""
    model = _load(folder)
    tokens = torch.tensor(list(ids))[None]
    prompt = len(ids) if prompt is None else prompt
    out = model(tokens[:, :prompt], use_cache=True)
    logits = [out.logits[0]]
    for i in range(prompt, len(ids)):
        out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits).numpy()


@torch.no_grad()
def hf_greedy(folder: str | Path, ids: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that greedy `generate` appends to `ids`; end-of-sequence tokens do not end it."""
    model = _load(folder)
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(list(ids))[None]
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()
