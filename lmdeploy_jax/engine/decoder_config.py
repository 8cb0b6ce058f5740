"""What a model is to be: what its config.json says, and what the engine's config makes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.models.config import (
    AttentionConfig,
    DecoderConfig,
    LatentConfig,
    LayerConfig,
    MixtureConfig,
)
from lmdeploy_jax.pallas_kernels.kv_formats import KV_FORMATS, KVFormat


def decoder_config(folder: Path, config: JaxEngineConfig) -> DecoderConfig:
    """The model with the KV cache that is wanted. Raises ConfigError where it cannot have it, and where its
    experts cannot be dealt out as is wanted.
    """
    model = read_config(folder, config.hf_overrides, config.model_format)
    check_ep(config, model)
    return with_quant_policy(model, config.quant_policy)


def changed_config(folder: Path, config: JaxEngineConfig) -> DecoderConfig | None:
    """The same, with the routes that are wanted; None where all is as config.json says."""
    if config.enable_return_routed_experts:
        return decoder_config(folder, config).with_routes()
    return decoder_config(folder, config) if config.quant_policy else None


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


def with_quant_policy(model: DecoderConfig, policy: int) -> DecoderConfig:
    """The model with K and V in the cache as LMDeploy's `quant_policy` has them; 0: as they come. States of
    recurrent layers stay.

    Raises ConfigError for a model without such a cache, and for heads that do not fill its words.
    """
    form = KV_FORMATS.get(policy)
    if form is None:
        return model
    if reason := _why_not(model, form):
        raise ConfigError(
            f"quant_policy={policy} ({form.name}) is not supported with this model: {reason}. Leave it out."
        )
    return replace(model, layers=tuple(_held(layer, form) for layer in model.layers))


def _why_not(model: DecoderConfig, form: KVFormat) -> str | None:
    latents = [mixer for mixer in model.mixers if isinstance(mixer, LatentConfig)]
    attention = [mixer for mixer in model.mixers if isinstance(mixer, AttentionConfig)]
    if latents or not attention:
        return "its cache holds latents, no keys and values" if latents else "it has no KV cache"
    sizes = (mixer.head_dim for mixer in attention if mixer.head_dim % form.per_word)
    odd = next(sizes, None)
    return None if odd is None else f"{odd} elements of a head do not fill words of {form.per_word}"


def _held(layer: LayerConfig, form: KVFormat) -> LayerConfig:
    mixer = layer.mixer
    return (
        replace(layer, mixer=replace(mixer, kv_format=form)) if isinstance(mixer, AttentionConfig) else layer
    )
