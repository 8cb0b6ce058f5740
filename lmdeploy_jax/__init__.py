"""LMDeploy's user surface on JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmdeploy_jax.config import JaxEngineConfig, PytorchEngineConfig, TurbomindEngineConfig, VisionConfig
from lmdeploy_jax.messages import GenerationConfig, Response

# Not lazily: importing the submodule later would put the module in the place of its namesake function.
from lmdeploy_jax.pipeline import Pipeline, pipeline
from lmdeploy_jax.session import Session

if TYPE_CHECKING:
    from lmdeploy_jax.text import ChatTemplateConfig, Tokenizer

__version__ = "0.1.0"
version_info = (0, 1, 0)
__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "JaxEngineConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "Session",
    "Tokenizer",
    "TurbomindEngineConfig",
    "VisionConfig",
    "__version__",
    "pipeline",
    "version_info",
]


def __getattr__(name: str) -> Any:
    """Names that need the text libraries are imported when first used, to keep this import instant."""
    if name not in ("ChatTemplateConfig", "Tokenizer"):
        raise AttributeError(f"module 'lmdeploy_jax' has no attribute {name!r}")
    return getattr(importlib.import_module("lmdeploy_jax.text"), name)
