"""The oracle of vision tests: tiny random checkpoints that transformers itself saves and runs in float32.

`save_checkpoint(name, folder)` writes one of `CONFIGS`; `hf_features` gives what its language model would
read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.oracle import Tensors, scramble
from tests.vision.pillow import processed

ORACLE = "oracle"  # subfolder with the checkpoint that transformers runs, where the tested one is not its own
TEXT: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Spec:
    """A transformers class's prefix, its vision config, the rest of its config, its image processor."""

    family: str
    vision: Mapping[str, Any]
    options: Mapping[str, Any]
    processor: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], None] | None = None


INTERN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": [28, 28],
    "patch_size": [7, 7],
    "attention_bias": True,
}
INTERN_6B = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
TILES = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 6}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
INTERN_OPTIONS = {"image_token_id": 100, "image_seq_length": 4}


def _published_internvl(**options: Any) -> Callable[[Path], None]:
    """`InternVLChatModel` of an `-hf` checkpoint: other names, q, k and v in one tensor."""

    def rewrite(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        vision, tensors = config["vision_config"], {}
        stored = load_file(path / "model.safetensors")
        for name, value in stored.items():
            if "q_proj" in name and "vision" in name:
                parts = [stored[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                value = np.concatenate(parts)
            if "vision" not in name or not any(part in name for part in ("k_proj", "v_proj")):
                tensors[_published_name(name)] = value
        kept = {key: vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                             "intermediate_size", "hidden_act", "norm_type",
                                             "layer_norm_eps")}  # fmt: skip
        renamed = {
            "image_size": vision["image_size"][0],
            "patch_size": vision["patch_size"][0],
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
        }
        published = {
            "architectures": ["InternVLChatModel"],
            "vision_config": kept | renamed,
            "llm_config": config["text_config"],
            "dynamic_image_size": True,
            "use_thumbnail": True,
            "max_dynamic_patch": 6,
            "force_image_size": vision["image_size"][0],
            "ps_version": "v2",
        }
        _replace(path, tensors, published | options)

    return rewrite


def _published_name(name: str) -> str:
    changes = {
        "vision_tower": "vision_model",
        "embeddings.cls_token": "embeddings.class_embedding",
        "position_embeddings": "position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "encoder.layer.": "encoder.layers.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_": "ls",
        "attention.projection_layer": "attn.proj",
        "attention.q_proj": "attn.qkv",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "multi_modal_projector.layer_norm": "mlp1.0",
        "multi_modal_projector.linear_1": "mlp1.1",
        "multi_modal_projector.linear_2": "mlp1.3",
    }
    for old, new in changes.items():
        name = name.replace(old, new)
    return name


def _replace(path: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Makes `path` a checkpoint of other tensors; what transformers saved goes to its subfolder."""
    kept = path / ORACLE
    kept.mkdir()
    for file in [*path.glob("*.json"), *path.glob("*.safetensors")]:
        file.rename(kept / file.name)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(config))


MROPE = {
    "image_token_id": 100,
    "video_token_id": 107,
    "vision_start_token_id": 105,
    "vision_end_token_id": 106,
}
QWEN_TEXT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
HYBRID = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
SIGLIP = CLIP | {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
    "num_hidden_layers": 2,
    "image_size": 32,
}
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4,
         "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
GEMMA_TEXT = {  # windows smaller than an image, and a layer without one
    "head_dim": 16,
    "sliding_window": 8,
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
POINTS = [[16, 32], [32, 16], [32, 32]]
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 40,
    "patch_size": 4,
}
GLM_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "image_size": 16,
}
GLM_PIXELS = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 8192}}
GLM_TEXT = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
}
GEMMA4_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 140,
}
GEMMA4_TEXT = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_bidirectional_attention": "vision",
}
CONFIGS: Mapping[str, Spec] = {
    "internvl_hf": Spec("InternVL", INTERN, INTERN_OPTIONS, "GotOcr2", TILES),
    "internvl_hf_6b": Spec("InternVL", INTERN | INTERN_6B, INTERN_OPTIONS, "GotOcr2", TILES),
    "internvl_hf_pooled": Spec(
        "InternVL", INTERN | {"use_mean_pooling": False}, INTERN_OPTIONS, "GotOcr2", TILES
    ),
    "internvl": Spec(
        "InternVL", INTERN, INTERN_OPTIONS, "GotOcr2", TILES | IMAGENET, rewrite=_published_internvl()
    ),
    "internvl_6b": Spec(
        "InternVL",
        INTERN | INTERN_6B,
        INTERN_OPTIONS,
        "GotOcr2",
        TILES | IMAGENET,
        rewrite=_published_internvl(),
    ),
    "qwen2_vl": Spec(
        "Qwen2VL",
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        QWEN_TEXT,
    ),
    "qwen2_5_vl": Spec(
        "Qwen2_5_VL",
        {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        QWEN_TEXT,
    ),
    "qwen3_vl": Spec(
        "Qwen3VL",
        QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]},
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        QWEN_TEXT | {"head_dim": 16, "num_hidden_layers": 3},
    ),
    "qwen3_vl_moe": Spec(
        "Qwen3VLMoe",
        QWEN3_TOWER | {"deepstack_visual_indexes": [1]},
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        QWEN_TEXT
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"tie_word_embeddings": False},
    ),
    "qwen3_5": Spec(
        "Qwen3_5",
        QWEN3_TOWER,
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        HYBRID,
    ),
    "qwen3_5_moe": Spec(
        "Qwen3_5Moe",
        QWEN3_TOWER,
        MROPE,
        "Qwen2VL",
        {"patch_size": 4, "min_pixels": 64, "max_pixels": 4096},
        HYBRID
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 24},
    ),
    "internvl_moe": Spec(
        "InternVL",
        INTERN,
        INTERN_OPTIONS,
        "GotOcr2",
        TILES,
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 16, "norm_topk_prob": True},
    ),
    "llava": Spec("Llava", CLIP, {"image_token_index": 100}, "CLIP", CROP),
    "llava_next": Spec(
        "LlavaNext",
        CLIP,
        {"image_token_index": 100, "image_grid_pinpoints": POINTS},
        "LlavaNext",
        CROP | {"image_grid_pinpoints": POINTS},
    ),
    "gemma3": Spec(
        "Gemma3",
        SIGLIP,
        {"mm_tokens_per_image": 16, "image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102},
        "Gemma3",
        {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        GEMMA_TEXT,
    ),
    "gemma3_crops": Spec(
        "Gemma3",
        SIGLIP,
        {"mm_tokens_per_image": 16, "image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102},
        "Gemma3",
        {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **CROPS},
        GEMMA_TEXT,
    ),
    "gemma4": Spec(
        "Gemma4",
        GEMMA4_TOWER | {"standardize": True},
        {"image_token_id": 100},
        "Gemma4",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        GEMMA4_TEXT,
    ),
    "gemma4_small": Spec(
        "Gemma4",
        GEMMA4_TOWER | {"use_clipped_linears": True},
        {"image_token_id": 100},
        "Gemma4",
        {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        GEMMA4_TEXT | {"hidden_size_per_layer_input": 8, "use_bidirectional_attention": None},
    ),
    "pixtral": Spec(
        "Llava",
        PIXTRAL,
        {"image_token_index": 100, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        "Pixtral",
        {"size": {"longest_edge": 40}, "patch_size": {"height": 4, "width": 4}},
    ),
    "mistral3": Spec(
        "Mistral3",
        PIXTRAL | {"hidden_act": "silu"},
        {"image_token_index": 100, "spatial_merge_size": 2, "vision_feature_layer": -1},
        "Pixtral",
        {"size": {"longest_edge": 40}, "patch_size": {"height": 8, "width": 8}},
        {"model_type": "mistral", "head_dim": 16},
    ),
    "glm4v": Spec("Glm4v", GLM_TOWER, MROPE, "Glm4v", GLM_PIXELS, GLM_TEXT),
    "glm4v_moe": Spec(
        "Glm4vMoe",
        GLM_TOWER,
        MROPE,
        "Glm4v",
        GLM_PIXELS,
        GLM_TEXT
        | {"num_hidden_layers": 2, "n_routed_experts": 6, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
}


def save_checkpoint(name: str, folder: Path) -> Path:
    """Saves the checkpoint `name` of `CONFIGS` in a folder, the same weights every time; returns `folder`."""
    spec = CONFIGS[name]
    config = getattr(transformers, f"{spec.family}Config")(
        vision_config=dict(spec.vision), text_config={**TEXT, **spec.text}, dtype="float32", **spec.options
    )
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{spec.family}ForConditionalGeneration")(config)
    scramble(model)
    _clip(model)
    model.save_pretrained(folder)
    hf_processor(name).save_pretrained(folder)
    if spec.rewrite is not None:
        spec.rewrite(folder)
    return folder


def _clip(model: torch.nn.Module) -> None:
    """Bounds of Gemma 4's products that are felt, each its own."""
    found = (item for item in model.named_buffers() if item[0].endswith(("put_min", "put_max")))
    for i, (name, bound) in enumerate(found):
        size = 0.5 + 0.07 * (i % 11)
        bound.fill_(-size if name.endswith("min") else size)


def hf_processor(name: str) -> Any:
    """The image processor of a checkpoint."""
    spec = CONFIGS[name]
    return getattr(transformers, f"{spec.processor}ImageProcessorPil")(**spec.settings)


def hf_model(name: str, folder: Path) -> Any:
    """The model of a saved checkpoint, in float32."""
    kept = folder / ORACLE
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    family = getattr(transformers, f"{CONFIGS[name].family}ForConditionalGeneration")
    return family.from_pretrained(kept if kept.is_dir() else folder, **options).eval()


@torch.no_grad()
def hf_features(name: str, folder: Path, images: Sequence[Image.Image]) -> np.ndarray:
    """The rows f32 [1 + k, rows, D] of all images one after the other, and those of k DeepStack layers."""
    model = hf_model(name, folder)
    inputs = processed(hf_processor(name), list(images), "pt")
    found = model.get_image_features(**_features_inputs(inputs))
    layers = [found.pooler_output, *getattr(found, "deepstack_features", ())]
    return np.stack([torch.cat([part.flatten(0, -2) for part in layer]).numpy() for layer in layers])


def _features_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
    return {name: inputs[name] for name in names if name in inputs}
