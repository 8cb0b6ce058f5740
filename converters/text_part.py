"""The language model within a checkpoint that takes images: its part of the config, its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_jax.converters.headers import TensorInfo
from lmdeploy_jax.converters.reader import TensorReader
from lmdeploy_jax.converters.slicing import Index
from lmdeploy_jax.errors import CheckpointError

TEXT_PARTS: Mapping[str, str] = {
    "InternVLChatModel": "llm_config",
    "InternVLForConditionalGeneration": "text_config",
    "Gemma3ForConditionalGeneration": "text_config",
    "Gemma4ForConditionalGeneration": "text_config",
    "Llama4ForConditionalGeneration": "text_config",
    "KimiK25ForConditionalGeneration": "text_config",
    "Kimi_K25ForConditionalGeneration": "text_config",
    "LlavaForConditionalGeneration": "text_config",
    "LlavaNextForConditionalGeneration": "text_config",
    "Mistral3ForConditionalGeneration": "text_config",
    "Qwen2VLForConditionalGeneration": "text_config",
    "Qwen2_5_VLForConditionalGeneration": "text_config",
    "Qwen3VLForConditionalGeneration": "text_config",
    "Qwen3VLMoeForConditionalGeneration": "text_config",
    "Glm4vForConditionalGeneration": "text_config",
    "Glm4vMoeForConditionalGeneration": "text_config",
    "KimiVLForConditionalGeneration": "text_config",
    "Qwen3_5ForConditionalGeneration": "text_config",
    "Qwen3_5MoeForConditionalGeneration": "text_config",
    "Phi3VForCausalLM": "text_config",
}
"""Under which name the configs of such architectures hold that of their language model."""
FLAT = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Phi3VForCausalLM")
"""Those whose configs may hold it among the fields of the whole."""
BESIDE_TEXT = ("vision_config", "vision_token_id", "vision_start_token_id", "vision_end_token_id",
               "image_token_id", "video_token_id", "embd_layer", "img_processor")  # fmt: skip
SHARED = ("tie_word_embeddings", "quantization_config", "compression_config")
"""Fields of the whole config that hold for the language model, whatever its own part says."""
_SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4},
    "llama": {**_SEVEN_BILLION, "intermediate_size": 11008},
    "mistral": _SEVEN_BILLION,
}
"""By `model_type`, what released checkpoints do not write into such a part since transformers' classes say it
(Gemma 3, LLaVA); a text model's own config says it."""
NAME = re.compile(
    r"language_model\.(.*)|(model\.)language_model\.(.*)|(model\.(?:embed_tokens|layers|norm)\..*|lm_head\..*)"
)


def text_part(raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """The config of the language model, and what to call it in errors; a text model's is the whole.

    Raises CheckpointError where such a config has no part for it.
    """
    named = raw.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    name = next((name for name in names if name in TEXT_PARTS), None)
    if name is None:
        return raw, where
    key = TEXT_PARTS[name]
    if name in FLAT and key not in raw:
        return {field: value for field, value in raw.items() if field not in BESIDE_TEXT}, where
    part = raw.get(key)
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{where}: {key} is {part!r:.100}; it must be the language model's config")
    shared = {name: raw[name] for name in SHARED if name in raw}
    return {**LEFT_OUT.get(str(part.get("model_type")), {}), **part, **shared}, f"{where} ({key})"


class TextPartReader:
    """The tensors of the language model, by the names that they have in a checkpoint of it alone."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        found = ((NAME.fullmatch(name), name) for name in reader.names())
        self._names = {"".join(filter(None, match.groups())): name for match, name in found if match}

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return self._reader.folder

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in file order."""
        return tuple(self._names)

    def whole_name(self, name: str) -> str:
        """What a tensor is called in the checkpoint."""
        return self._names.get(name, name)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor. CheckpointError if there is none of that name."""
        return self._reader.info(self.whole_name(name))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The slice `index` (step 1) of a tensor."""
        return self._reader.read(self.whole_name(name), index)

    def read_into(self, name: str, index: Index, out: np.ndarray) -> None:
        """Reads the slice `index` into `out` (the slice's shape), converted to the dtype of `out`."""
        self._reader.read_into(self.whole_name(name), index, out)
