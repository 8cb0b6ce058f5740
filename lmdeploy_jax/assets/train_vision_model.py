"""tiny-vision as transformers trains it, and as the checkpoint in the published InternVL layout.

Needs torch and transformers, which has InternVL under other names than the published checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Model = Any  # InternVLForConditionalGeneration, whose own annotations no type checker follows
Tensors = dict[str, torch.Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GAIN = 0.7  # of initial weights
DOWNSAMPLE = 0.5  # a token of the decoder is a square of two by two patches

# transformers' names -> the published ones; q, k and v of the tower are one tensor there.
PUBLISHED = (
    (r"^(model\.)?vision_tower\.", "vision_model."),
    (r"^(model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^(model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^(model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^(model\.)?language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
)
FUSED = re.compile(r"(.*vision_tower.*)\.attention\.([qkv])_proj\.(\w+)")


@dataclass(frozen=True)
class Size:
    """How large a model is: image and patch in pixels a side, widths, layers.

    What is trained by default takes 9 MB in bfloat16.
    """

    image: int = 112
    patch: int = 8
    tower_width: int = 192
    tower_layers: int = 6
    width: int = 192
    layers: int = 4

    def __post_init__(self) -> None:
        if self.image % int(self.patch / DOWNSAMPLE):
            raise ValueError(f"image {self.image}: no multiple of two patches of {self.patch} pixels")

    @property
    def tokens(self) -> int:
        """Of an image, in the decoder."""
        return int(self.image // self.patch * DOWNSAMPLE) ** 2


def new_model(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int) -> Model:
    """A freshly initialised InternViT with a Qwen3 behind it, in float32."""
    torch.manual_seed(seed)
    context = tokenizer.get_vocab()["<IMG_CONTEXT>"]
    config = InternVLConfig(
        vision_config=_tower(size), text_config=_decoder(tokenizer, size), image_token_id=context,
        image_seq_length=size.tokens, downsample_ratio=DOWNSAMPLE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model: Model = InternVLForConditionalGeneration(config)
    _initialise(model)
    return model


def _initialise(model: Model) -> None:
    """Weights by their inputs' number, where transformers has 0.02: that small, they leave a narrow model
    unmoved by its images for hundreds of steps. Positions are drawn too: transformers fills them with zeros.
    """
    for name, value in model.named_parameters():
        if value.ndim in (2, 4) and re.search(r"layer|projector|patch", name):
            torch.nn.init.normal_(value, std=GAIN * value[0].numel() ** -0.5)
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.02)


def _tower(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.tower_width, "intermediate_size": 4 * size.tower_width,
        "num_hidden_layers": size.tower_layers, "num_attention_heads": size.tower_width // 32,
        "image_size": [size.image] * 2, "patch_size": [size.patch] * 2, "attention_bias": True,
        "layer_scale_init_value": 1.0,
    }  # fmt: skip


def _decoder(tokenizer: PreTrainedTokenizerFast, size: Size) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": size.width,
        "intermediate_size": 2 * size.width, "num_hidden_layers": size.layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def save(model: Model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a bfloat16 checkpoint as those of OpenGVLab are: config, weights, tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(published(weights), out / "model.safetensors", {"format": "pt"})
    ends = {"eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]}
    _write(out / "config.json", published_config(model))
    _write(out / "preprocessor_config.json", _preprocessor(model))
    _write(
        out / "generation_config.json", ends | {"pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    )
    tokenizer.save_pretrained(out)
    # Any version of transformers knows this class name.
    path = out / "tokenizer_config.json"
    _write(path, json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def load(model: Model, folder: Path) -> None:
    """Take the weights that `save` wrote for a model of the same size."""
    saved = load_file(folder / "model.safetensors")
    model.load_state_dict({name: _saved(saved, name) for name in model.state_dict()})


def _saved(saved: Tensors, name: str) -> torch.Tensor:
    if fused := FUSED.fullmatch(name):
        return saved[_fused_name(fused)].chunk(3)["qkv".index(fused[2])]
    return saved[_name(name)]


def published(weights: Tensors) -> Tensors:
    """The weights under the published names."""
    return dict(_published(weights))


def _published(weights: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in weights.items():
        fused = FUSED.fullmatch(name)
        if fused is None:
            yield _name(name), value.contiguous()
        elif fused[2] == "q":
            parts = [weights[f"{fused[1]}.attention.{part}_proj.{fused[3]}"] for part in "qkv"]
            yield _fused_name(fused), torch.cat(parts)


def _fused_name(fused: re.Match[str]) -> str:
    return f"{_name(fused[1] + '.')}attn.qkv.{fused[3]}"


def _name(name: str) -> str:
    for pattern, new in PUBLISHED:
        name = re.sub(pattern, new, name)
    return name


def published_config(model: Model) -> dict[str, Any]:
    """`InternVLChatConfig`: a tile for every image, no thumbnail beside it."""
    vision, text = model.config.vision_config, model.config.text_config.to_dict()
    image = vision.image_size[0]
    tower = {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "image_size": image,
        "patch_size": vision.patch_size[0], "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads, "num_channels": 3, "hidden_act": "gelu",
        "norm_type": "layer_norm", "layer_norm_eps": vision.layer_norm_eps, "qkv_bias": True,
        "qk_normalization": False, "use_flash_attn": False,
    }  # fmt: skip
    kept = {name: text[name] for name in _decoder_fields(text)}
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "dtype": "bfloat16",
        "downsample_ratio": DOWNSAMPLE, "dynamic_image_size": True, "force_image_size": image,
        "min_dynamic_patch": 1, "max_dynamic_patch": 1, "use_thumbnail": False, "pad2square": False,
        "ps_version": "v2", "select_layer": -1, "template": "internvl2_5", "tie_word_embeddings": False,
        "vision_config": tower, "llm_config": {"architectures": ["Qwen3ForCausalLM"], **kept},
    }  # fmt: skip


def _decoder_fields(text: dict[str, Any]) -> list[str]:
    wanted = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
              "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "eos_token_id",
              "pad_token_id", "attention_bias")  # fmt: skip
    return [name for name in wanted if name in text]


def _preprocessor(model: Model) -> dict[str, Any]:
    side = model.config.vision_config.image_size[0]
    return {
        "image_processor_type": "CLIPImageProcessor", "crop_size": side, "size": side, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_resize": True, "resample": 3,
        "image_mean": list(MEAN), "image_std": list(STD),
    }  # fmt: skip
