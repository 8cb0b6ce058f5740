"""Mixtral: a Mistral whose MLPs are mixtures."""

from __future__ import annotations

from lmdeploy_jax.converters.families.common import count_layers, decoder_config, head_size
from lmdeploy_jax.converters.families.mixture import MixtureNames, read_mixture
from lmdeploy_jax.converters.families.rope import read_rope
from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.models.config import DecoderConfig

MIXTRAL_NAMES = MixtureNames("block_sparse_moe", experts=("w1", "w3", "w2"))


def mixtral_config(fields: Fields) -> DecoderConfig:
    """HF `MixtralConfig`: the weights of a token's experts always sum to 1."""
    head_dim = head_size(fields)
    window = fields.optional_size("sliding_window", None)
    mixture = read_mixture(
        fields, width=fields.size("intermediate_size"), experts=8, per_token=2, normalise=True
    )
    return decoder_config(
        fields,
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=1e6),
        windows=(window,) * count_layers(fields),
        mixture=mixture,
        norm_eps=fields.positive("rms_norm_eps", 1e-5),
    )
