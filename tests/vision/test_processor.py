"""What a request may ask for with an image, and how patches are listed."""

from __future__ import annotations

import pytest

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.processor import ImageProcessor
from lmdeploy_jax.vision.resize import FixedSize, GridRatio, HDTransform, ResizeRule, SmartResize

TILES = ImageProcessor(GridRatio(448), 14, 2)


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({}, 13),
        ({"detail": "auto"}, 13),
        ({"detail": "low"}, 7),
        ({"max_dynamic_patch": 1}, 1),
        ({"detail": "high", "max_dynamic_patch": 2}, 2 + 1),
    ],
)
def test_tiles(options, views):
    assert TILES.with_options(options).plan(600, 800 if views != 3 else 1200).views == views


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        (SmartResize(28, 3136, 10**6), {"max_pixels": 28 * 28 * 4}, SmartResize(28, 3136, 28 * 28 * 4)),
        (SmartResize(28, 3136, 10**6), {"min_pixels": 7, "detail": "high"}, SmartResize(28, 7, 10**6)),
        (HDTransform(336, 16), {"num_crops": 4}, HDTransform(336, 4)),
        (FixedSize(448), {"detail": "low"}, FixedSize(448)),
    ],
)
def test_options_of_rules(rule: ResizeRule, options: dict[str, object], expected: ResizeRule) -> None:
    assert ImageProcessor(rule, 14).with_options(options).rule == expected


def test_bounds_that_exclude_each_other():
    with pytest.raises(RequestError, match="min_pixels is 9000, more than max_pixels=8000"):
        ImageProcessor(SmartResize(28, 3136, 8000), 14, 2).with_options({"min_pixels": 9000})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_pixels": 5}, "min_pixels is unknown to this model; known: detail, max_dynamic_patch"),
        ({"detail": "utmost"}, "choose auto, low, medium, high"),
        ({"max_dynamic_patch": 0}, "must be a positive integer"),
        ({"max_dynamic_patch": True}, "must be a positive integer"),
        ({"max_dynamic_patch": "4"}, "must be a positive integer"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(RequestError, match=message):
        TILES.with_options(options)
