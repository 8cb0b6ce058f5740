"""Runs of the encoder: which views share one, and that there is one for every view that a prompt can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmdeploy_jax.cache.encoder_cache import EncoderCacheManager
from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.engine.core.buckets import LONG_RUNS, plan
from lmdeploy_jax.pallas_kernels.encoder_attention.xla import DENSE, QUERIES
from lmdeploy_jax.prompt import EncodedPrompt, Span, SpanImage
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
    grid = rows * merge, columns * merge
    return SpanImage(patches, grid, count, count, rows * columns, size_of(config, grid))


def prompt(*images: SpanImage) -> EncodedPrompt:
    ends = np.cumsum([len(each.rows) for each in images]).tolist()
    starts = [0, *ends[:-1]]
    spans = (Span(start, end - start, bytes([start % 251])) for start, end in zip(starts, ends, strict=True))
    return EncodedPrompt(range(ends[-1]), tuple(spans), images=images)


@pytest.mark.parametrize("name", ["mistral3", "qwen2_5_vl"])
def test_small_images_share_a_run(name: str, configs: dict[str, VisionModelConfig]) -> None:
    config = configs[name]
    buckets = plan("gpu", 8, 512).for_patches("gpu", 5000, 16)
    images = [image(config, 4, 6), image(config, 2, 2, views=3), image(config, 20, 20), image(config, 2, 4)]
    cache = EncoderCacheManager(1000, run_size=buckets.shared, joining_size=buckets.joining)
    asked = prompt(*images)
    assert cache.reach(asked, 0, len(asked), len(asked)) == len(asked)
    runs = cache.take_runs()
    assert [len(run.views) for run in runs] == [4, 1, 1]
    places = np.concatenate([view.places for run in runs for view in run.views])
    np.testing.assert_array_equal(places, np.arange(len(asked)))


def test_views_of_which_nothing_is_wanted_are_left_out(configs: dict[str, VisionModelConfig]) -> None:
    """Learned rows, which have numbers below 0, come with any run."""
    whole = image(configs["internvl_hf"], 2, 2, views=30)
    some = replace(whole, rows=np.array([-1, 9, 110]), places=np.arange(3))
    cache = EncoderCacheManager(1000, run_size=13, joining_size=4, learned=1)
    assert cache.reach(prompt(some), 0, 3, 3) == 3
    (run,) = cache.take_runs()
    assert [(view.number, view.rows.tolist()) for view in run.views] == [(2, [9]), (27, [110])]
    index = cache.index([(prompt(some), 0, 3)])
    assert index is not None
    assert index.tolist() == [999, *(int(view.places[0]) for view in run.views)]


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
