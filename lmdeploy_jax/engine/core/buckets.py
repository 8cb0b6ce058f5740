"""The shapes that are compiled. No other file decides on a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

REPORT_ROWS = 64  # rows whose logits are reported on, or pass through Python, in one call
# Few rows cost what eight do; many, what they are.
GPU_DECODE = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
# Square views in one run; 13: most of InternVL's images. A CPU gains nothing by more than a few at once.
TILES = {"cpu": (1, 4), "gpu": (1, 2, 4, 8, 13)}
PATCHES = 1024  # of a run that several views share: in larger ones, patches of other views cost too much
LONG_RUNS = (1024, 4096)  # patches beyond which a run is attended to in blocks of as many
JOINING_TILES = 4  # of a run beside answers that somebody reads along: about as long as a decode step
ENCODER_CACHE_BYTES = {"cpu": 64 << 20, "gpu": 512 << 20}  # of images' rows that are held on the device
PAGE_COPIES = 64  # pages duplicated in one call
STATE_COPIES = 8  # states, which are far larger


@dataclass(frozen=True)
class Buckets:
    """Sizes in rising order; the last is the limit."""

    decode: tuple[int, ...]  # sequences of a decode step; also rows of a greedy head
    sampling: tuple[int, ...]  # rows of the heads that do more
    tokens: tuple[int, ...]  # tokens of a ragged step
    steps: int = 1  # most decode steps in one call
    encoder: tuple[int, ...] = TILES["cpu"]  # of an encoder's run, in what `packing.size_of` counts
    shared: int = TILES["cpu"][-1]  # of a run, what several views may take; a larger one is alone
    joining: int = JOINING_TILES  # the same beside answers that somebody reads along
    images: tuple[int, ...] = ()  # tokens of a ragged step some of which are images'
    image_rows: int = 0  # of images that are held on the device

    @property
    def max_batch_size(self) -> int:
        return self.decode[-1]

    @property
    def max_tokens(self) -> int:
        return self.tokens[-1]

    def for_patches(self, platform: str, longest: int, unit: int) -> Buckets:
        """The same for an encoder whose views come in all sizes.

        longest: places that the largest view takes; unit: what every run is a multiple of.
        """
        first, factor = min(256, longest), 4 if platform == "cpu" else 2
        sizes = sorted({_long_run(size, unit) for size in _ladder(first, longest, factor)})
        shared = min(PATCHES, sizes[-1])
        return replace(self, encoder=tuple(sizes), shared=shared, joining=shared)


def plan(platform: str, max_batch_size: int, max_tokens: int, steps: int = 1) -> Buckets:
    """Buckets for a device kind. On a CPU programs are slow to compile and padding is cheap, so they are
    few.
    """
    tokens = max(max_tokens, max_batch_size)
    if platform == "cpu":
        decode, sampling = _ladder(1, max_batch_size, 8), _ladder(1, max_batch_size, 64)
        ragged = _ladder(32, tokens, 4)
        return Buckets(decode, sampling, ragged, steps, images=ragged[-2:])
    sizes = (size for size in GPU_DECODE if size < max_batch_size)
    sampling = tuple(sorted({*_ladder(1, max_batch_size, 8), min(128, max_batch_size)}))
    tiles = TILES["gpu"]
    ragged = _gpu_tokens(tokens)
    return Buckets((*sizes, max_batch_size), sampling, ragged, steps, tiles, tiles[-1], images=ragged)


def image_rows(platform: str, row_bytes: int, least: int) -> int:
    """Rows of images that a device kind holds, `least` being what the largest view gives."""
    return max(ENCODER_CACHE_BYTES["cpu" if platform == "cpu" else "gpu"] // row_bytes, least)


def _gpu_tokens(most: int) -> tuple[int, ...]:
    """Powers of two, and the size of a step in which prompts join a large batch."""
    return tuple(sorted({*_ladder(128, most, 2), min(384, most)}))


def _long_run(size: int, unit: int) -> int:
    """At least `size`, a multiple of the blocks that a run of that size is attended to in."""
    for block in (1, *LONG_RUNS):
        if size > block:
            unit = lcm(unit, block)
            size = -(-size // unit) * unit
    return size


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * factor, last))
    return tuple(sizes)
