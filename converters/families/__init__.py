"""Model families: how a `config.json` becomes a `DecoderConfig`, and which tensor fills which weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lmdeploy_jax.converters.families.apertus import (
    apertus_config,
    apertus_rules,
    arcee_config,
    arcee_rules,
)
from lmdeploy_jax.converters.families.cohere import (
    cohere2_config,
    cohere2_moe_config,
    cohere_config,
    cohere_moe_rules,
    cohere_rules,
)
from lmdeploy_jax.converters.families.deepseek import (
    deepseek_v2_config,
    deepseek_v3_config,
    deepseek_v32_config,
    dots1_config,
    glm4_moe_lite_config,
    glm_moe_dsa_config,
    latent_rules,
    minicpm3_config,
)
from lmdeploy_jax.converters.families.ernie import (
    ernie_config,
    ernie_moe_config,
    ernie_moe_rules,
    ernie_rules,
)
from lmdeploy_jax.converters.families.exaone import EXAONE_NAMES, exaone4_config, exaone_moe_config
from lmdeploy_jax.converters.families.falcon_h1 import falcon_h1_config, falcon_h1_rules
from lmdeploy_jax.converters.families.gemma import gemma2_config, gemma2_rules, gemma3_config, gemma_config
from lmdeploy_jax.converters.families.gemma4 import gemma4_config, gemma4_rules
from lmdeploy_jax.converters.families.glm import (
    MROPE as GLM_MROPE,
)
from lmdeploy_jax.converters.families.glm import (
    glm4_config,
    glm4_moe_config,
    glm4_rules,
    glm4v_config,
    glm_config,
    glm_rules,
    solar_open_config,
)
from lmdeploy_jax.converters.families.gpt_oss import GPT_OSS_STACKED, gpt_oss_config, gpt_oss_rules
from lmdeploy_jax.converters.families.granite import (
    GRANITE_STACKED,
    granite_config,
    granite_hybrid_config,
    granite_hybrid_rules,
    granite_moe_config,
    granite_moe_rules,
)
from lmdeploy_jax.converters.families.hunyuan import (
    HY_V3_NAMES,
    hunyuan_config,
    hunyuan_moe_config,
    hunyuan_moe_rules,
    hunyuan_rules,
    hy_v3_config,
)
from lmdeploy_jax.converters.families.internlm import internlm2_config, internlm3_config
from lmdeploy_jax.converters.families.lfm2 import lfm2_config, lfm2_moe_config, lfm2_rules
from lmdeploy_jax.converters.families.llama import llama_config
from lmdeploy_jax.converters.families.llama4 import LLAMA4_STACKED, llama4_config, llama4_rules
from lmdeploy_jax.converters.families.minimax import MINIMAX_NAMES, minimax_m2_config
from lmdeploy_jax.converters.families.mistral import ministral3_config, ministral_config, mistral_config
from lmdeploy_jax.converters.families.mixtral import MIXTRAL_NAMES, mixtral_config
from lmdeploy_jax.converters.families.mixture import mixture_rules
from lmdeploy_jax.converters.families.nemotron import nemotron_h_config, nemotron_h_rules
from lmdeploy_jax.converters.families.olmo import (
    flex_olmo_config,
    flex_olmo_rules,
    olmo2_config,
    olmo3_config,
    olmoe_config,
    post_norm_rules,
)
from lmdeploy_jax.converters.families.phi3 import phi3_config
from lmdeploy_jax.converters.families.phimoe import PHIMOE_NAMES, phimoe_config
from lmdeploy_jax.converters.families.qwen import (
    QWEN2_MROPE,
    QWEN3_MROPE,
    QWEN_NAMES,
    mimo_config,
    qwen2_config,
    qwen2_moe_config,
    qwen3_config,
    qwen3_moe_config,
    qwen3_vl_moe_config,
)
from lmdeploy_jax.converters.families.qwen_hybrid import (
    qwen3_5_config,
    qwen3_5_moe_config,
    qwen3_5_rules,
    qwen3_next_config,
    qwen3_next_rules,
)
from lmdeploy_jax.converters.families.refused import REFUSED
from lmdeploy_jax.converters.families.scores import (
    ONE_LAYER,
    TWO_LAYERS,
    VALUE,
    read_classes,
    read_steps,
    read_two_layers,
    read_value,
    scored_config,
    scored_rules,
)
from lmdeploy_jax.converters.families.seed_oss import seed_oss_config
from lmdeploy_jax.converters.families.smollm3 import smollm3_config
from lmdeploy_jax.converters.families.starcoder2 import starcoder2_config, starcoder2_rules
from lmdeploy_jax.converters.families.tables import hf_rules, internlm2_rules
from lmdeploy_jax.converters.fields import Fields, shown
from lmdeploy_jax.converters.keytable import Rule
from lmdeploy_jax.converters.stacked import StackedExperts
from lmdeploy_jax.errors import CheckpointError, UnsupportedModelError
from lmdeploy_jax.models.config import DecoderConfig
from lmdeploy_jax.models.score_config import ScoreConfig


@dataclass(frozen=True)
class Family:
    """One architecture. `rules` takes the config and the number of devices that share a layer."""

    config: Callable[[Fields], DecoderConfig]
    rules: Callable[[DecoderConfig, int], tuple[Rule, ...]] = hf_rules
    stacked: StackedExperts | None = None
    """How a checkpoint may hold all experts of a layer in one tensor; None: the family has no experts."""


STACKED = StackedExperts()

EXAONE_MOE = Family(exaone_moe_config, partial(mixture_rules, names=EXAONE_NAMES), STACKED)
PHIMOE = Family(phimoe_config, partial(mixture_rules, names=PHIMOE_NAMES), STACKED)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(llama_config),
    "Llama4ForCausalLM": Family(llama4_config, llama4_rules, LLAMA4_STACKED),
    "MistralForCausalLM": Family(mistral_config),
    "MinistralForCausalLM": Family(ministral_config),
    "Ministral3ForCausalLM": Family(ministral3_config),
    "MixtralForCausalLM": Family(mixtral_config, partial(mixture_rules, names=MIXTRAL_NAMES), STACKED),
    "Qwen2ForCausalLM": Family(qwen2_config),
    "Qwen2MoeForCausalLM": Family(qwen2_moe_config, partial(mixture_rules, names=QWEN_NAMES), STACKED),
    "Qwen3ForCausalLM": Family(qwen3_config),
    "Qwen3MoeForCausalLM": Family(qwen3_moe_config, mixture_rules, STACKED),
    "Qwen3NextForCausalLM": Family(qwen3_next_config, qwen3_next_rules, STACKED),
    "Qwen3_5ForCausalLM": Family(qwen3_5_config, qwen3_5_rules),
    "Qwen3_5MoeForCausalLM": Family(qwen3_5_moe_config, qwen3_5_rules, STACKED),
    "InternLM2ForCausalLM": Family(internlm2_config, internlm2_rules),
    "InternLM3ForCausalLM": Family(internlm3_config),
    "Phi3ForCausalLM": Family(phi3_config, partial(hf_rules, fused=True)),
    "Phi3VForCausalLM": Family(phi3_config, partial(hf_rules, fused=True)),
    "PhiMoEForCausalLM": PHIMOE,
    "PhimoeForCausalLM": PHIMOE,
    "GptOssForCausalLM": Family(gpt_oss_config, gpt_oss_rules, GPT_OSS_STACKED),
    "GlmForCausalLM": Family(glm_config, glm_rules),
    "Glm4ForCausalLM": Family(glm4_config, glm4_rules),
    "Glm4MoeForCausalLM": Family(glm4_moe_config, mixture_rules, STACKED),
    "DeepseekV2ForCausalLM": Family(deepseek_v2_config, latent_rules, STACKED),
    "DeepseekV3ForCausalLM": Family(deepseek_v3_config, latent_rules, STACKED),
    "DeepseekV32ForCausalLM": Family(deepseek_v32_config, latent_rules, STACKED),
    "GlmMoeDsaForCausalLM": Family(glm_moe_dsa_config, latent_rules, STACKED),
    "Glm4MoeLiteForCausalLM": Family(glm4_moe_lite_config, latent_rules, STACKED),
    "MiniMaxM2ForCausalLM": Family(minimax_m2_config, partial(mixture_rules, names=MINIMAX_NAMES), STACKED),
    "Ernie4_5ForCausalLM": Family(ernie_config, ernie_rules),
    "Ernie4_5_MoeForCausalLM": Family(ernie_moe_config, ernie_moe_rules, STACKED),
    "HunYuanDenseV1ForCausalLM": Family(hunyuan_config, hunyuan_rules),
    "HunYuanMoEV1ForCausalLM": Family(hunyuan_moe_config, hunyuan_moe_rules, STACKED),
    "Olmo2ForCausalLM": Family(olmo2_config, post_norm_rules),
    "Olmo3ForCausalLM": Family(olmo3_config, post_norm_rules),
    "OlmoeForCausalLM": Family(olmoe_config, mixture_rules, STACKED),
    "FlexOlmoForCausalLM": Family(flex_olmo_config, flex_olmo_rules, STACKED),
    "CohereForCausalLM": Family(cohere_config, cohere_rules),
    "Cohere2ForCausalLM": Family(cohere2_config, cohere_rules),
    "Cohere2MoeForCausalLM": Family(cohere2_moe_config, cohere_moe_rules, STACKED),
    "Exaone4ForCausalLM": Family(exaone4_config, post_norm_rules),
    "ExaoneMoeForCausalLM": EXAONE_MOE,
    "ExaoneMoEForCausalLM": EXAONE_MOE,
    "MiniCPM3ForCausalLM": Family(minicpm3_config, partial(latent_rules, pairs=False)),
    "MiMoForCausalLM": Family(mimo_config),
    "Starcoder2ForCausalLM": Family(starcoder2_config, starcoder2_rules),
    "ApertusForCausalLM": Family(apertus_config, apertus_rules),
    "ArceeForCausalLM": Family(arcee_config, arcee_rules),
    "HYV3ForCausalLM": Family(hy_v3_config, partial(mixture_rules, names=HY_V3_NAMES), STACKED),
    "Dots1ForCausalLM": Family(dots1_config, mixture_rules, STACKED),
    "SolarOpenForCausalLM": Family(solar_open_config, mixture_rules, STACKED),
    "GraniteForCausalLM": Family(granite_config),
    "GraniteMoeForCausalLM": Family(granite_moe_config, granite_moe_rules, GRANITE_STACKED),
    "GraniteMoeSharedForCausalLM": Family(granite_moe_config, granite_moe_rules, GRANITE_STACKED),
    "GraniteMoeHybridForCausalLM": Family(granite_hybrid_config, granite_hybrid_rules, GRANITE_STACKED),
    "NemotronHForCausalLM": Family(nemotron_h_config, nemotron_h_rules),
    "FalconH1ForCausalLM": Family(falcon_h1_config, falcon_h1_rules),
    "Lfm2ForCausalLM": Family(lfm2_config, lfm2_rules),
    "Lfm2MoeForCausalLM": Family(lfm2_moe_config, lfm2_rules),
    "SmolLM3ForCausalLM": Family(smollm3_config),
    "SeedOssForCausalLM": Family(seed_oss_config),
    "GemmaForCausalLM": Family(gemma_config),
    "Gemma2ForCausalLM": Family(gemma2_config, gemma2_rules),
    "Gemma3ForCausalLM": Family(gemma3_config, gemma2_rules),
    "Gemma4ForCausalLM": Family(gemma4_config, gemma4_rules, STACKED),
    "Qwen2VLForConditionalGeneration": Family(partial(qwen2_config, mrope=QWEN2_MROPE)),
    "Qwen2_5_VLForConditionalGeneration": Family(partial(qwen2_config, mrope=QWEN2_MROPE)),
    "Qwen3VLForConditionalGeneration": Family(partial(qwen3_config, mrope=QWEN3_MROPE)),
    "Qwen3VLMoeForConditionalGeneration": Family(
        qwen3_vl_moe_config, mixture_rules, StackedExperts(transposed=None)
    ),
    "Glm4vForConditionalGeneration": Family(glm4v_config, glm4_rules),
    "Glm4vMoeForConditionalGeneration": Family(
        partial(glm4_moe_config, mrope=GLM_MROPE), mixture_rules, STACKED
    ),
}
"""The supported architectures, by the name in a config's `architectures`."""


def _scored(name: str, read: Callable[[Fields], ScoreConfig], names: Mapping[str, str]) -> Family:
    family = FAMILIES[name]
    config = partial(scored_config, base=family.config, read=read)
    return replace(family, config=config, rules=partial(scored_rules, base=family.rules, names=names))


CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
SCORED: Mapping[str, Family] = {
    **{
        name.replace(CAUSAL, CLASSIFIER): _scored(name, read_classes, ONE_LAYER)
        for name in FAMILIES
        if name.endswith(CAUSAL)
    },
    "Gemma3TextForSequenceClassification": _scored("Gemma3ForCausalLM", read_classes, ONE_LAYER),
    "InternLM2ForRewardModel": _scored("InternLM2ForCausalLM", read_value, VALUE),
    "Qwen2ForRewardModel": _scored("Qwen2ForCausalLM", read_two_layers, TWO_LAYERS),
    "Qwen2ForProcessRewardModel": _scored("Qwen2ForCausalLM", read_steps, TWO_LAYERS),
}
"""Those with a head that judges texts."""

MODEL_TYPES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi3_v": "Phi3VForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "mimo": "MiMoForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "apertus": "ApertusForCausalLM",
    "arcee": "ArceeForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "solar_open": "SolarOpenForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "qwen2_vl_text": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl_text": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl_text": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe_text": "Qwen3VLMoeForConditionalGeneration",
    "glm4v_text": "Glm4vForConditionalGeneration",
    "glm4v_moe_text": "Glm4vMoeForConditionalGeneration",
}
"""The architecture of each `model_type`, by which a config without `architectures` goes."""


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a config: the first supported one of its `architectures`, else that of its `model_type`.

    Raises UnsupportedModelError for an architecture that is not supported.
    """
    names = _architectures(raw, where)
    for name in names:
        if name in FAMILIES or name in SCORED:
            return FAMILIES.get(name) or SCORED[name]
    needs = next((f" (it needs {REFUSED[name]})" for name in names if name in REFUSED), "")
    raise UnsupportedModelError(
        f"{where}: architecture {', '.join(names)} is not supported{needs}; supported: {', '.join(FAMILIES)}"
    )


def _architectures(raw: Mapping[str, Any], where: str) -> list[str]:
    named, kind = raw.get("architectures"), raw.get("model_type")
    names = [named] if isinstance(named, str) else named or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {shown(named)}; it must be a list of class names")
    if names:
        return names
    if isinstance(kind, str) and kind in MODEL_TYPES:
        return [MODEL_TYPES[kind]]
    raise CheckpointError(
        f"{where}: architectures is {shown(named)} and model_type {shown(kind)} tells no architecture; write "
        'the model\'s class into config.json, such as "architectures": ["LlamaForCausalLM"]'
    )


def build_config(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    """A config's `DecoderConfig`; `where` names the config in errors.

    Raises UnsupportedModelError for an unknown architecture, and fields that ask for what is missing here.
    """
    fields = Fields(raw, where)
    config = family_of(raw, where).config(fields)
    fields.finish()
    return config
