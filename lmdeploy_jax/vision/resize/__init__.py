"""Rules by which pictures of any size become views that a tower takes: one frozen record a rule."""

from lmdeploy_jax.vision.resize.packed import MOST_RATIO, PACKED, LongestEdge, NaViT, PatchBudget, SmartResize
from lmdeploy_jax.vision.resize.plan import ImagePlan, ResizeRule
from lmdeploy_jax.vision.resize.tiles import (
    MOST_TILES,
    BestFit,
    FixedSize,
    GridRatio,
    HDTransform,
    PanAndScan,
    Pinpoints,
    ShortestEdge,
)

__all__ = [
    "MOST_RATIO",
    "MOST_TILES",
    "PACKED",
    "BestFit",
    "FixedSize",
    "GridRatio",
    "HDTransform",
    "ImagePlan",
    "LongestEdge",
    "NaViT",
    "PanAndScan",
    "PatchBudget",
    "Pinpoints",
    "ResizeRule",
    "ShortestEdge",
    "SmartResize",
]
