"""What can be known of a model before it is loaded: seconds, and no JAX. What is wrong with a name, a
tokenizer or a template is told here, not after minutes of loading and compiling.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_jax.config import JaxEngineConfig, QuantPolicy
from lmdeploy_jax.converters.vision_config import servable_vision
from lmdeploy_jax.engine.decoder_config import decoder_config
from lmdeploy_jax.engine.nodes.settings import check_nodes
from lmdeploy_jax.hub import resolve_model
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.chat_template import ChatTemplate, select
from lmdeploy_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmdeploy_jax.vision.config import VisionModelConfig
    from lmdeploy_jax.vision.families import VisionFamily

    Vision = tuple[VisionFamily, VisionModelConfig]


log = logging.getLogger("lmdeploy_jax")


@dataclass(frozen=True)
class PreparedModel:
    """A model that has been found and looked at. An engine opens `folder` with `config`."""

    folder: Path
    config: JaxEngineConfig
    model_config: DecoderConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    vision: Vision | None = None
    """What becomes of images, where it takes any."""


def prepare(
    model: str | Path,
    config: JaxEngineConfig | None = None,
    template: ChatTemplateConfig | str | None = None,
) -> PreparedModel:
    """Find a model's folder, downloading it from the hub where that is asked for, and read all but its
    weights.

    model: a checkpoint folder, a hub id, or an embedded model's name.
    template: the chat template that is to replace the checkpoint's own; see `select`.
    Raises ConfigError, CheckpointError, UnsupportedModelError.
    """
    config = config or JaxEngineConfig()
    check_nodes(config)
    folder = resolve_model(str(model), revision=config.revision, download_dir=config.download_dir)
    model_config = decoder_config(folder, config)
    if config.quant_policy == QuantPolicy.INT4:
        log.warning("quant_policy=4: some models, Qwen's above all, lose much with int4; 8 is safe")
    tokenizer = Tokenizer(folder, config.trust_remote_code)
    vision = None if config.language_model_only else servable_vision(folder, config.hf_overrides)
    chosen = select(tokenizer, folder, template)
    return PreparedModel(folder, config, model_config, tokenizer, chosen, vision)
