"""What can be known of a model before it is loaded: seconds, and no JAX. What is wrong with a name, a
tokenizer or a template is told here, not after minutes of loading and compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.vision_config import servable_vision
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.hub import resolve_model
from lmdeploy_jax.models.config import DecoderConfig, MixtureConfig
from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.chat_template import ChatTemplate, select
from lmdeploy_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmdeploy_jax.vision.config import VisionModelConfig
    from lmdeploy_jax.vision.families import VisionFamily

    Vision = tuple[VisionFamily, VisionModelConfig]


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


def check_ep(config: JaxEngineConfig, model: DecoderConfig) -> None:
    """Raises ConfigError where the model's experts cannot be dealt out so."""
    if config.ep == 1:
        return
    if config.tp % config.ep:
        raise ConfigError(
            f"ep={config.ep} does not divide tp={config.tp}: experts are dealt out over the tp devices; "
            f"choose an ep that divides tp, or tp={config.ep} and ep={config.ep}."
        )
    counts = {layer.mlp.router.experts for layer in model.layers if isinstance(layer.mlp, MixtureConfig)}
    if not counts:
        raise ConfigError(f"ep={config.ep} deals out experts, and this model has none; leave ep out.")
    for count in counts:
        if count % config.ep:
            raise ConfigError(
                f"ep={config.ep} does not divide the model's {count} experts; choose one that does."
            )


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
    folder = resolve_model(str(model), revision=config.revision, download_dir=config.download_dir)
    model_config = read_config(folder, config.hf_overrides, config.model_format)
    tokenizer = Tokenizer(folder, config.trust_remote_code)
    vision = None if config.language_model_only else servable_vision(folder, config.hf_overrides)
    chosen = select(tokenizer, folder, template)
    check_ep(config, model_config)
    return PreparedModel(folder, config, model_config, tokenizer, chosen, vision)
