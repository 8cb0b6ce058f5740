"""What the families with `SmartResize` share: Qwen-VL and GLM-V."""

from __future__ import annotations

from lmdeploy_jax.converters.fields import Fields
from lmdeploy_jax.vision.families.base import Triple, normalisation, resample, side
from lmdeploy_jax.vision.processor import ImageProcessor
from lmdeploy_jax.vision.resize import ImagePlan, SmartResize

MOST_PIXELS = 2**31 - 1


def smart_processor(
    vision: Fields,
    files: Fields,
    *,
    patch: int,
    pixels: tuple[int, int],
    normal: tuple[Triple, Triple],
    frames: int = 1,
    enlarges: bool = False,
) -> ImageProcessor:
    """The processor of `Qwen2VLImageProcessor` and its like.

    patch, pixels, normal: where the files say nothing: patch size, least and most pixels, mean and deviation.
    frames, enlarges: as in `SmartResize`.
    """
    patch, merge = side(vision, "patch_size", patch), vision.size("spatial_merge_size", 2)
    temporal = vision.size("temporal_patch_size", 2)
    for name, own in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", temporal)):
        if (given := files.size(name, own)) != own:
            raise files.unsupported(name, given, f"{own}, as the tower has it")
    least, most = pixel_bounds(files, pixels)
    rule = SmartResize(patch * merge, least, most, frames, enlarges, resample(files, "bicubic"))
    mean, std = normalisation(files, *normal)
    return ImageProcessor(rule, patch, merge, frames=temporal, mean=mean, std=std)


def pixel_bounds(files: Fields, pixels: tuple[int, int]) -> tuple[int, int]:
    """Old names at the top go before `size`, whose edges are pixels in all here."""
    size = files.within("size")
    least = files.size("min_pixels", size.size("shortest_edge", pixels[0], most=MOST_PIXELS))
    most = files.size("max_pixels", size.size("longest_edge", pixels[1], most=MOST_PIXELS))
    if least > most:
        raise files.unsupported("min_pixels", least, f"at most max_pixels={most}")
    return least, most


def patch_shape(vision: Fields, processor: ImageProcessor, channels: str = "in_channels") -> tuple[int, ...]:
    """Of the pixels of a patch, [C, frames, P, P]."""
    return vision.size(channels, 3), processor.frames, processor.patch, processor.patch


def count(processor: ImageProcessor, plan: ImagePlan) -> int:
    """Rows of an image."""
    rows, columns = processor.tokens(plan)
    return plan.views * rows * columns
