"""LMDeploy's other path to what `lmdeploy_jax.vl` has."""

from lmdeploy_jax.vl import encode_image_base64, encode_video_base64, load_image, load_video

__all__ = ["encode_image_base64", "encode_video_base64", "load_image", "load_video"]
