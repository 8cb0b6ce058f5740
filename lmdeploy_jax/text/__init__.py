"""Text in and out: tokenizer, incremental detokenizer, stop strings, chat templates. Never imports jax."""

from lmdeploy_jax.text.chat_config import ChatTemplateConfig
from lmdeploy_jax.text.tokenizer import Tokenizer

__all__ = ["ChatTemplateConfig", "Tokenizer"]
