"""Released checkpoints: what their two JSON files give, by the numbers that are known of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from lmdeploy_jax.converters.vision import read_vision
from lmdeploy_jax.vision.model import VisionModel

INTERN_VIT = {
    "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0, "dropout": 0.0,
    "hidden_act": "gelu", "hidden_size": 1024, "image_size": 448, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b", "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "output_attentions": False, "patch_size": 14, "qk_normalization": False,
    "qkv_bias": True, "return_dict": True, "use_bfloat16": True, "use_flash_attn": True,
}  # fmt: skip
INTERN_VIT_6B = INTERN_VIT | {
    "hidden_size": 3200, "intermediate_size": 12800, "norm_type": "rms_norm", "num_attention_heads": 25,
    "num_hidden_layers": 45, "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
INTERN = {
    "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "dynamic_image_size": True,
    "force_image_size": 448, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "ps_version": "v2",
    "select_layer": -1, "use_thumbnail": True,
}  # fmt: skip
CLIP = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    "vocab_size": 32000,
}  # fmt: skip
CROP = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "resample": 3}
QWEN2_5 = {
    "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
    "in_channels": 3, "in_chans": 3, "initializer_range": 0.02, "intermediate_size": 3420,
    "model_type": "qwen2_5_vl", "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2,
    "window_size": 112,
}  # fmt: skip
PHI3_V = {
    "architectures": ["Phi3VForCausalLM"], "hidden_size": 3072,
    "embd_layer": {"embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
                   "use_hd_transform": True, "with_learnable_separator": True},
    "img_processor": {"image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336",
                      "name": "clip_vision_model", "num_img_tokens": 144},
}  # fmt: skip
PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # config.json, the image processor's file, rows of an image of 800 x 600, millions of the tower's numbers
    "InternVL2-8B": (
        INTERN | {"vision_config": INTERN_VIT, "llm_config": {"hidden_size": 4096}}, {}, 3328, 304,
    ),
    "InternVL2-26B": (
        INTERN | {"vision_config": INTERN_VIT_6B, "llm_config": {"hidden_size": 6144}}, {}, 3328, 5536,
    ),
    "Qwen2.5-VL-7B": (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": QWEN2_5}, PIXELS, 609, 632,
    ),
    "Qwen2-VL-7B": (
        {"architectures": ["Qwen2VLForConditionalGeneration"],
         "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                           "hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                           "spatial_patch_size": 14, "temporal_patch_size": 2}},
        PIXELS, 609, 631,
    ),
    "Qwen3-VL": (
        {"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {"depth": 27}},
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}, 475, 416,
    ),
    "llava-1.5-7b-hf": (
        {"architectures": ["LlavaForConditionalGeneration"], "vision_config": CLIP}, CROP, 576, 291,
    ),
    "llava-v1.6-vicuna-7b-hf": (
        {"architectures": ["LlavaNextForConditionalGeneration"], "vision_config": CLIP}, CROP, 2340, 291,
    ),
    "gemma-3-4b-it": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 2560},
         "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                           "model_type": "siglip_vision_model", "num_attention_heads": 16,
                           "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}},
        {"size": {"height": 896, "width": 896}}, 256, 417,
    ),
    "Mistral-Small-3.1": (
        {"architectures": ["Mistral3ForConditionalGeneration"],
         "vision_config": {"model_type": "pixtral", "patch_size": 14, "image_size": 1540}},
        {"size": {"longest_edge": 1540}}, 638, 403,
    ),
    "Phi-3.5-vision": (PHI3_V, {"num_crops": 16}, 1921, 291),
    "GLM-4.1V-9B": (
        {"architectures": ["Glm4vForConditionalGeneration"], "vision_config": {"depth": 24}}, {}, 609, 682,
    ),
    "Kimi-VL-A3B": (
        {"architectures": ["KimiVLForConditionalGeneration"], "text_config": {"hidden_size": 2048},
         "vision_config": {"model_type": "moonvit", "patch_size": 14, "init_pos_emb_height": 64,
                           "merge_kernel_size": [2, 2]}},
        {"in_token_limit": 4096}, 638, 417,
    ),
    "Kimi-K2.5": (
        {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": {"hidden_size": 7168},
         "vision_config": {"patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64,
                           "init_pos_emb_time": 4, "pos_emb_type": "divided_fixed",
                           "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27, "vt_hidden_size": 1152,
                           "vt_intermediate_size": 4304, "merge_kernel_size": [2, 2],
                           "video_attn_type": "spatial_temporal", "merge_type": "sd2_tpool",
                           "mm_projector_type": "patchmerger", "mm_hidden_size": 1152,
                           "projector_hidden_act": "gelu", "projector_ln_eps": 1e-5,
                           "text_hidden_size": 7168}},
        {"media_proc_cfg": {"in_patch_limit": 16384, "patch_size": 14, "image_mean": [0.5] * 3,
                            "image_std": [0.5] * 3, "merge_kernel_size": 2, "patch_limit_on_one_side": 512}},
        638, 417,
    ),
    "Llama-4-Scout": (
        {"architectures": ["Llama4ForConditionalGeneration"], "text_config": {"hidden_size": 5120},
         "vision_config": {"attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408,
                           "image_size": 336, "initializer_range": 0.02, "intermediate_size": 5632,
                           "model_type": "llama4_vision_model", "multi_modal_projector_bias": False,
                           "norm_eps": 1e-05, "num_attention_heads": 16, "num_channels": 3,
                           "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
                           "projector_dropout": 0.0, "projector_input_dim": 4096,
                           "projector_output_dim": 4096, "rope_theta": 10000, "vision_feature_layer": -1,
                           "vision_feature_select_strategy": "default", "vision_output_dim": 4096}},
        {"size": {"height": 336, "width": 336}, "max_patches": 16, "resample": 2, "image_mean": [0.5] * 3,
         "image_std": [0.5] * 3, "resize_to_max_canvas": False}, 1008, 811,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw, files, rows, millions = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(files))
    family, config = read_vision(tmp_path)
    assert not caplog.records
    plan = config.processor.plan(600, 800)
    assert len(family.rows(config, plan)) == rows
    assert family.placeholder.expand(config.processor, plan).count(family.placeholder.token) == rows
    abstract = nnx.eval_shape(lambda: VisionModel(config, dtype=jax.numpy.dtype("bfloat16")))
    leaves = jax.tree.leaves(nnx.state(abstract.tower, nnx.Param))
    assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e6) == millions
