"""Runs of the encoder: which views share one, and that there is one for every view that a prompt can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.engine.core.buckets import LONG_RUNS, plan
from lmdeploy_jax.engine.core.encoder_runs import Wanted, plan_runs
from lmdeploy_jax.prompt import SpanImage
from lmdeploy_jax.vision.attention import DENSE, QUERIES
from lmdeploy_jax.vision.config import VisionModelConfig
from lmdeploy_jax.vision.packing import most_places, size_of
from tests.vision.oracle import save_checkpoint

TOKENS = 65536  # of the longest prompt


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VisionModelConfig]:
    names = ("internvl_hf", "mistral3", "qwen2_5_vl")
    folders = {name: save_checkpoint(name, tmp_path_factory.mktemp("runs") / name) for name in names}
    return {name: read_vision(folder)[1] for name, folder in folders.items()}


def image(config: VisionModelConfig, rows: int, columns: int, views: int = 1) -> SpanImage:
    merge = config.processor.merge
    patches = np.zeros((views, rows * columns * merge**2, 1), np.uint8)
    count = np.arange(views * rows * columns, dtype=np.int32)
    return SpanImage(patches, (rows * merge, columns * merge), count, count)


def wanted(image: SpanImage, first: int) -> Wanted:
    return Wanted(image, image.rows, image.rows + first)


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl"])
def test_small_images_share_a_run(name: str, configs: dict[str, VisionModelConfig]) -> None:
    config = configs[name]
    buckets = plan("gpu", 8, 512).for_patches("gpu", 5000, 16)
    images = [image(config, 4, 6), image(config, 2, 2, views=3), image(config, 20, 20), image(config, 2, 4)]
    firsts = np.cumsum([0, *(len(each.rows) for each in images)])
    given = [wanted(each, first) for each, first in zip(images, firsts[:-1], strict=True)]
    runs = list(plan_runs(config, given, buckets))
    assert [len(run.views) for run in runs] == [4, 1, 1]
    np.testing.assert_array_equal(np.concatenate([run.places for run in runs]), np.arange(firsts[-1]))
    np.testing.assert_array_equal(runs[0].rows, np.arange(firsts[2]))  # they begin anew in each run
    np.testing.assert_array_equal(runs[1].rows, np.arange(400))


def test_views_of_which_nothing_is_wanted_are_left_out(configs: dict[str, VisionModelConfig]) -> None:
    """Learned rows, which have numbers below 0, come from one run."""
    config = configs["internvl_hf"]
    whole = image(config, 2, 2, views=30)
    (run,) = plan_runs(config, [Wanted(whole, np.array([9, 110]), np.array([1, 0]))], plan("cpu", 8, 512))
    assert (len(run.views), run.rows.tolist(), run.places.tolist()) == (2, [1, 6], [1, 0])
    learned = Wanted(whole, np.array([-1, 9, 110]), np.array([7, 1, 0]))
    (run,) = plan_runs(config, [learned], plan("cpu", 8, 512))
    assert (len(run.views), run.rows.tolist(), run.places.tolist()) == (3, [-1, 5, 10], [7, 1, 0])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("longest", [4, 100, 256, 1000, 4900, 65536, 91053])
def test_runs_are_whole_blocks(platform: str, longest: int) -> None:
    assert LONG_RUNS == (DENSE, QUERIES)
    sizes = plan(platform, 8, 512).for_patches(platform, longest, 36).encoder
    assert longest <= sizes[-1] < longest + 9 * QUERIES
    for size in sizes:
        assert size % 36 == 0
        assert size <= DENSE or size % DENSE == 0
        assert size <= QUERIES or size % QUERIES == 0


@pytest.mark.parametrize(
    ("name", "field", "size"), [("mistral3", "edge", 1540), ("qwen2_5_vl", "most", 2**20)]
)
def test_the_largest_run_takes_every_image(
    name: str, field: str, size: int, configs: dict[str, VisionModelConfig]
) -> None:
    tiny: Any = configs[name]
    rule = replace(tiny.processor.rule, **{field: size})
    config: Any = replace(tiny, processor=replace(tiny.processor, rule=rule))
    processor, most = config.processor, most_places(config, TOKENS)
    rng = np.random.default_rng(0)
    for _ in range(200):
        height = int(rng.integers(1, 3000))
        ratio = np.exp(rng.uniform(-5.2, 5.2))  # up to 181
        width = max(1, round(height * ratio))
        if max(height, width) > 200 * min(height, width):
            continue
        grid = processor.grid(processor.plan(height, width))
        assert size_of(config, grid) <= most, (height, width)
    side = processor.grid(processor.plan(3000, 3000))
    assert 2 * side[0] * side[1] > most, "far more than needed"
    assert most_places(config, 1) < most
