"""What stands for an image in a text."""

from lmdeploy_jax.text.conversation import IMAGE_TOKEN

__all__ = ["IMAGE_TOKEN"]
