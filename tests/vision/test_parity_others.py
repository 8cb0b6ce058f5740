"""Families that transformers does not have: parts of it, put together as the checkpoints' own code does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from lmdeploy_jax.converters.vision import load_vision
from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.vision.pixels import normalize
from tests.oracle import scramble
from tests.vision.pictures import picture
from tests.vision.test_parity import assert_close, features

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 32,
}
KIMI_TEXT = {
    "model_type": "deepseek_v3", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
KIMI_NAMES = {
    "vision_tower.encoder.patch_embed": "vision_tower.patch_embed",
    "mm_projector.proj.0": "multi_modal_projector.linear_1",
    "mm_projector.proj.2": "multi_modal_projector.linear_2",
    "model.mm_projector.pre_norm": "multi_modal_projector.pre_norm",
}


@pytest.mark.parametrize("saved", ["kimi_vl", "kimi_k25", "kimi_k25_published"])
@torch.no_grad()
def test_kimi(saved: str, tmp_path: Path) -> None:
    """Kimi-VL by Kimi K2.5, whose tower does the same with one frame; that as saved and as published."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "patch_size": 4,
    }  # fmt: skip
    table = {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4}
    config = transformers.Kimi_K25Config(
        vision_config=vision | table, text_config=KIMI_TEXT, projection_hidden_size=32, dtype="float32"
    )
    torch.manual_seed(0)
    model = transformers.Kimi_K25ForConditionalGeneration(config).eval()
    scramble(model)
    model.save_pretrained(tmp_path)
    files: dict[str, Any] = {"max_patches": 100}
    if saved == "kimi_vl":
        published = {"init_pos_emb_height": 8, "init_pos_emb_width": 8, "merge_kernel_size": [2, 2]}
        _rewrite(tmp_path, KIMI_NAMES, "KimiVLForConditionalGeneration", vision | published)
        files = {"in_token_limit": 100}
    elif saved == "kimi_k25_published":
        named = {f"vt_{name}": value for name, value in vision.items() if name != "patch_size"}
        init = {f"init_{name}": value for name, value in table.items()}
        whole = {**named, **init, "patch_size": 4, "merge_kernel_size": [2, 2], "mm_hidden_size": 32}
        names = {"vision_tower.encoder.patch_embed": "vision_tower.patch_embed", "model.mm_p": "mm_p"}
        _rewrite(tmp_path, names, "KimiK25ForConditionalGeneration", whole)
        files = {"media_proc_cfg": {"in_patch_limit": 100, "patch_limit_on_one_side": 512}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(files))

    loaded = load_vision(tmp_path)
    images = [picture(60, 85), picture(32, 32, seed=1)]
    processor = loaded.config.processor
    pixels, grids = [], []
    for image in images:
        view = normalize(processor.rule.views(image)[0], processor.mean, processor.std)
        rows, columns = view.shape[0] // 4, view.shape[1] // 4
        grids.append([1, rows, columns])
        pixels.append(view.reshape(rows, 4, columns, 4, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 4, 4))
    assert grids[1] == [1, 8, 8]  # the table's own grid
    patches = torch.tensor(np.concatenate(pixels))
    rows = model.model.get_image_features(patches, torch.tensor(grids)).pooler_output
    assert_close(features(loaded, images)[0], torch.cat([part.reshape(-1, 64) for part in rows]).numpy())


def _rewrite(folder: Path, names: Mapping[str, str], architecture: str, vision: Mapping[str, Any]) -> None:
    """The checkpoint by other names of its tensors, and of the fields of its config."""
    stored = load_file(folder / "model.safetensors")
    renamed = {}
    for name, value in stored.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    save_file(renamed, folder / "model.safetensors")
    raw = {"architectures": [architecture], "vision_config": vision, "text_config": {"hidden_size": 64}}
    (folder / "config.json").write_text(json.dumps(raw))


@torch.no_grad()
def test_llama4(tmp_path: Path) -> None:
    """By pixels of its own: transformers rounds them to 16 bits."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
        "image_size": 16, "patch_size": 4, "projector_input_dim": 24, "projector_output_dim": 24,
        "vision_output_dim": 24,
    }  # fmt: skip
    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 2,
    }  # fmt: skip
    config = transformers.Llama4Config(vision_config=vision, text_config=text, dtype="float32")
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(config).eval()
    scramble(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))

    loaded = load_vision(tmp_path)
    images = [picture(60, 85), picture(16, 12, seed=1)]
    processor = loaded.config.processor
    views = np.concatenate([np.stack(processor.rule.views(image)) for image in images])
    inputs = torch.tensor(normalize(views, processor.mean, processor.std)).permute(0, 3, 1, 2)
    hidden = model.get_image_features(inputs).last_hidden_state
    rows = model.multi_modal_projector(hidden.reshape(-1, hidden.shape[-1]))
    assert_close(features(loaded, images)[0], rows.numpy())
    plan = processor.plan(33, 60)
    assert (plan.rows, plan.columns, plan.views) == (3, 4, 13)
    text = loaded.family.placeholder.expand(processor, plan)
    line = "<|tile_x_separator|>".join(["<|patch|>" * 4] * 4) + "<|tile_y_separator|>"
    assert text == f"<|image_start|>{line * 3}<|image|>{'<|patch|>' * 4}<|image_end|>"


@torch.no_grad()
def test_phi3_v(tmp_path: Path) -> None:
    """By CLIP and the steps of the checkpoints' own code: merged by 2 x 2, lines ended, views divided."""
    features_of = save_phi3_v(tmp_path, {}, {"hidden_size": 64})
    images = [picture(60, 85), picture(90, 30, seed=1)]
    assert_close(features(load_vision(tmp_path), images)[0], features_of(images).numpy())


def save_phi3_v(
    folder: Path, text: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Callable[[Sequence[Image.Image]], torch.Tensor]:
    """Saves a checkpoint with the tensors and the config of a language model 64 wide -> what gives the rows
    of images.
    """
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)).eval()
    scramble(clip)
    project = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    newline, separator = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 128)
    prefix = "model.vision_embed_tokens."
    tensors = {f"{prefix}img_projection.{name}": value for name, value in project.state_dict().items()}
    tensors |= {f"{prefix}img_processor.vision_model.{n}": v for n, v in clip.state_dict().items()}
    tensors |= {f"{prefix}sub_GN": newline, f"{prefix}glb_GN": separator}
    whole = {name: value.numpy() for name, value in tensors.items()} | dict(text)
    save_file(whole, folder / "model.safetensors")
    raw = dict(config) | {
        "architectures": ["Phi3VForCausalLM"],
        "img_processor": CLIP | {"name": "clip_vision_model", "image_dim_out": 32, "num_img_tokens": 4},
        "embd_layer": {"hd_transform_order": "sub_glb", "projection_cls": "mlp"},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps({"num_crops": 4}))
    processor = read_vision(folder)[1].processor

    def rows_of(image: Image.Image) -> torch.Tensor:
        views = normalize(np.stack(processor.rule.views(image)), processor.mean, processor.std)
        inputs = torch.tensor(views).permute(0, 3, 1, 2)
        hidden = clip(inputs, output_hidden_states=True).hidden_states[-2][:, 1:]
        plan = processor.plan(image.height, image.width)
        tiles = _phi_lines(hidden[1:], plan.rows, plan.columns, newline)
        whole = _phi_lines(hidden[:1], 1, 1, newline)
        return project(torch.cat([tiles, separator[0], whole]))

    @torch.no_grad()
    def features_of(images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.cat([rows_of(image) for image in images])

    return features_of


def _phi_lines(hidden: torch.Tensor, rows: int, columns: int, newline: torch.Tensor) -> torch.Tensor:
    count, patches, width = hidden.shape
    side = int(patches**0.5)
    merged = hidden.reshape(count, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
    merged = merged.reshape(rows, columns, side // 2, side // 2, 4 * width).permute(0, 2, 1, 3, 4)
    lines = merged.reshape(rows * side // 2, columns * side // 2, 4 * width)
    ends = newline[0].expand(len(lines), 1, 4 * width)
    return torch.cat([lines, ends], dim=1).reshape(-1, 4 * width)
