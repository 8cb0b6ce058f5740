"""Vision families: how two JSON files become a `VisionModelConfig`, and which tensor fills which weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy_jax.vision.families import (
    gemma3,
    gemma4,
    glm4v,
    internvl,
    kimi_vl,
    llama4,
    llava,
    phi3_v,
    pixtral,
    qwen2_vl,
    qwen3_vl,
)
from lmdeploy_jax.vision.families.base import VisionFamily

VISION_FAMILIES: Mapping[str, VisionFamily] = {
    "InternVLChatModel": internvl.PUBLISHED,
    "InternVLForConditionalGeneration": internvl.HF,
    "Qwen2VLForConditionalGeneration": qwen2_vl.QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": qwen2_vl.QWEN2_5_VL,
    "Qwen3VLForConditionalGeneration": qwen3_vl.QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl.QWEN3_VL,
    "Qwen3_5ForConditionalGeneration": qwen3_vl.QWEN3_5,
    "Qwen3_5MoeForConditionalGeneration": qwen3_vl.QWEN3_5,
    "LlavaForConditionalGeneration": llava.LLAVA,
    "LlavaNextForConditionalGeneration": llava.LLAVA_NEXT,
    "Gemma3ForConditionalGeneration": gemma3.GEMMA3,
    "Gemma4ForConditionalGeneration": gemma4.GEMMA4,
    "Llama4ForConditionalGeneration": llama4.LLAMA4,
    "Mistral3ForConditionalGeneration": pixtral.MISTRAL3,
    "Phi3VForCausalLM": phi3_v.PHI3_V,
    "KimiVLForConditionalGeneration": kimi_vl.KIMI_VL,
    "KimiK25ForConditionalGeneration": kimi_vl.KIMI_K25,
    "Kimi_K25ForConditionalGeneration": kimi_vl.KIMI_K25,
    "Glm4vForConditionalGeneration": glm4v.GLM4V,
    "Glm4vMoeForConditionalGeneration": glm4v.GLM4V,
}
"""The architectures that take images, by the name in a config's `architectures`."""


def vision_family(raw: Mapping[str, Any]) -> VisionFamily | None:
    """The family of a config; None where it takes no images. Pixtral-12B is LLaVA with another tower."""
    named, tower = raw.get("architectures"), raw.get("vision_config")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    found = next((VISION_FAMILIES[name] for name in names if name in VISION_FAMILIES), None)
    if found is llava.LLAVA and isinstance(tower, Mapping) and tower.get("model_type") == "pixtral":
        return pixtral.PIXTRAL
    if found is gemma4.GEMMA4:
        return gemma4.family_of(raw.get("text_config")) if isinstance(tower, Mapping) else None
    return found
