"""Architectures that people load and that do not run here: what they would need."""

from __future__ import annotations

from collections.abc import Mapping

STATE = "layers with a recurrent state"
PACKED = "remote code's names of tensors; give the checkpoint in transformers' layout"
ENCODER = "attention in both directions: it is an encoder and gives no text"
VISION = "an encoder of images in remote code"
GATES = "gates on attention's output"
OLD = "an older block of its own"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "KimiLinearForCausalLM",
            "MambaForCausalLM", "Mamba2ForCausalLM", "JambaForCausalLM",
            "BambaForCausalLM", "Zamba2ForCausalLM", "MiniMaxForCausalLM", "OlmoHybridForCausalLM",
            "BailingMoeV2_5ForCausalLM",
        ),
        STATE,
    ),
    "Gemma3nForConditionalGeneration": "several residual streams, and inputs of each layer",
    "DeepseekV4ForCausalLM": "compressed attention and several residual streams",
    "Mistral4ForCausalLM": "latent attention whose queries grow with their position",
    "MiMoV2FlashForCausalLM": "values of another size than keys",
    "DeepseekForCausalLM": "mixtures in a block that transformers does not have",
    **dict.fromkeys(("AfmoeForCausalLM", "LagunaForCausalLM", "Step3p5ForCausalLM"), GATES),
    "LongcatFlashForCausalLM": "two blocks a layer, and experts that do nothing",
    "BailingMoeV2ForCausalLM": PACKED,
    "ChatGLMForConditionalGeneration": PACKED,
    "ChatGLMModel": PACKED,
    "BaichuanForCausalLM": PACKED,
    "QWenLMHeadModel": PACKED,
    **dict.fromkeys(
        (
            "NemotronForCausalLM", "StableLmForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM",
            "GPT2LMHeadModel", "FalconForCausalLM", "GPTJForCausalLM", "BloomForCausalLM", "MptForCausalLM",
            "DbrxForCausalLM", "OlmoForCausalLM", "HeliumForCausalLM", "MiniCPMForCausalLM",
        ),
        OLD,
    ),
    "SDARForCausalLM": "decoding by blocks of noise",
    "SDARMoeForCausalLM": "decoding by blocks of noise",
    "MiniCPMV": VISION,
    "MiniCPMO": VISION,
    "DeepseekVLV2ForCausalLM": VISION,
    "CogVLMForCausalLM": VISION,
    **dict.fromkeys(
        (
            "BertModel", "BertForSequenceClassification", "RobertaModel", "RobertaForSequenceClassification",
            "XLMRobertaModel", "XLMRobertaForSequenceClassification", "ModernBertModel",
            "ModernBertForSequenceClassification", "DebertaV2ForSequenceClassification", "NomicBertModel",
            "NewModel", "NewForSequenceClassification", "GteModel", "JinaEmbeddingsV3Model", "MPNetModel",
            "T5EncoderModel",
        ),
        ENCODER,
    ),
}  # fmt: skip
"""What each would need that does not exist here yet."""
