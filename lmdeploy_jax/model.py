"""Chat templates under LMDeploy's names: classes that programs register, and their configuration."""

from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.template_classes import MODELS, BaseChatTemplate

__all__ = ["MODELS", "BaseChatTemplate", "ChatTemplateConfig"]
