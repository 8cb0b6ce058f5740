"""Images for prompts, under LMDeploy's names."""

from __future__ import annotations

import base64
from io import BytesIO

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.load import ImageSource, load_image
from lmdeploy_jax.vl.constants import IMAGE_TOKEN

__all__ = ["IMAGE_TOKEN", "encode_image_base64", "load_image"]


def encode_image_base64(image: ImageSource, format: str = "PNG") -> str:
    """An image as a file in base64, which after "data:image/png;base64," is a URL.

    image: whatever `load_image` takes. format: Pillow's name of the file's. Raises `RequestError` for what is
    no image and for a format that cannot be written.
    """
    file = BytesIO()
    try:
        load_image(image).save(file, format)
    except (KeyError, OSError) as error:
        raise RequestError(f"format={format!r} cannot be written: {error}. Give PNG or JPEG.") from error
    return base64.b64encode(file.getvalue()).decode()
