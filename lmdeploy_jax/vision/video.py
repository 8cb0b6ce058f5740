"""Which frames of a video a model sees, how large, and where in time they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.processor import ImageProcessor, ProcessedImage
from lmdeploy_jax.vision.resize import ImagePlan, SmartResize

FPS = 2.0  # frames of a second that are looked at
FEWEST, MOST = 4, 768  # frames
BUDGET = 115_200  # tokens of a video whose frames have bounds of their own: nine tenths of a long context


@dataclass(frozen=True)
class Video:
    """A video whose frames are decoded as they are asked for.

    total: frames; fps: of them in a second; height, width: in pixels.
    frames: gives those of some numbers, which rise.
    whole: somebody has chosen the frames already, and all of them are to be seen.
    """

    total: int
    fps: float
    height: int
    width: int
    frames: Callable[[Sequence[int]], Iterator[Image.Image]]
    whole: bool = False


@dataclass(frozen=True)
class VideoRule:
    """How a family's videos are prepared.

    least, most: bounds of a frame's pixels; where frames are `dated`, of those of all frames together.
    dated: the prompt tells each view's time, and each view is an image to M-RoPE (Qwen3-VL).
    tokens_per_second: positions in time that a second takes (Qwen2.5-VL); None: a view takes one.
    """

    least: int
    most: int
    dated: bool = False
    tokens_per_second: float | None = None

    OPTIONS: ClassVar[tuple[str, ...]] = ("fps", "num_frames", "min_pixels", "max_pixels")

    def with_options(self, options: Mapping[str, Any]) -> VideoRule:
        """The rule with a request's bounds. Raises RequestError for what is no option of videos."""
        for name, value in options.items():
            if name not in self.OPTIONS:
                raise RequestError(f"video option {name} is unknown; known: {', '.join(self.OPTIONS)}")
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (name == "fps" and isinstance(value, float))) or not 0 < value < 2**31:
                kind = "number" if name == "fps" else "integer"
                raise RequestError(f"video option {name} is {value!r}; it must be a positive {kind}")
        return replace(
            self, least=options.get("min_pixels", self.least), most=options.get("max_pixels", self.most)
        )

    @property
    def most_pixels(self) -> int:
        """Of the largest frame."""
        return self.most // 2 if self.dated else self.most

    def sample(self, video: Video, options: Mapping[str, Any], group: int) -> list[int]:
        """The numbers of the frames that are looked at. group: frames of a view.

        Raises RequestError where there are not as many as are asked for.
        """
        if video.whole:
            return self._all(video, options)
        count = self._count(video, options)
        if self.dated:
            return np.linspace(0, video.total - 1, count).round().astype(int).tolist()
        count = max(count // group * group, min(group, video.total))
        steps = np.arange(count) * (video.total / count)
        return steps.astype(np.float32).astype(int).tolist()

    def _count(self, video: Video, options: Mapping[str, Any]) -> int:
        """Where both are given, `fps` says how many and `num_frames` how many at most, as in LMDeploy."""
        wanted = options.get("num_frames")
        if wanted is None or "fps" in options:
            count = int(video.total / video.fps * options.get("fps", FPS))
            return min(max(count, FEWEST), MOST, video.total, wanted or MOST)
        if wanted > min(MOST, video.total):
            raise RequestError(
                f"num_frames is {wanted}, but the video has {video.total}, and at most {MOST} are looked at; "
                "lower it"
            )
        return wanted

    def _all(self, video: Video, options: Mapping[str, Any]) -> list[int]:
        if "num_frames" in options:
            raise RequestError("num_frames chooses among the frames of a file; of a list all are taken")
        if video.total > MOST:
            raise RequestError(f"the video has {video.total} frames; give at most {MOST}")
        return list(range(video.total))

    def resize(self, rule: SmartResize, frames: int, group: int) -> SmartResize:
        """The rule for the frames of a video of so many, by that for images."""
        if self.dated:
            counted = max(frames, group)
            return replace(rule, least=self.least, most=self.most, frames=counted, enlarges=True)
        share = BUDGET * rule.factor**2 * group // frames
        most = max(min(self.most, share), int(self.least * 1.05))
        return replace(rule, least=self.least, most=max(most, self.least))

    def times(self, numbers: Sequence[int], fps: float, group: int) -> tuple[float, ...]:
        """Seconds in the middle of each view; none where the prompt tells no times."""
        if not self.dated:
            return ()
        padded = [*numbers, *[numbers[-1]] * (-len(numbers) % group)]
        views = [padded[first : first + group] for first in range(0, len(padded), group)]
        return tuple((view[0] / fps + view[-1] / fps) / 2 for view in views)

    def interval(self, frames: int, video: Video, group: int) -> float:
        """Positions from a view to the next, as `VisionGrid.interval` has it."""
        if self.tokens_per_second is None:
            return 1.0
        return self.tokens_per_second * group / (frames / video.total * video.fps)


def prepare_video(
    processor: ImageProcessor,
    rule: VideoRule,
    video: Video,
    options: Mapping[str, Any],
    check: Callable[[ImagePlan], None],
) -> ProcessedImage:
    """A video as a tower takes it, a view for each `processor.frames` of its frames.

    check: is shown the plan before a frame is decoded, and raises where it is too large.
    Raises RequestError for frames that cannot be had or are not all of one size.
    """
    group, resize = processor.frames, processor.rule
    assert isinstance(resize, SmartResize)
    numbers = rule.sample(video, options, group)
    sized = replace(processor, rule=rule.resize(resize, len(numbers), group))
    plan = replace(
        sized.plan(video.height, video.width),
        views=-(-len(numbers) // group),
        times=rule.times(numbers, video.fps, group),
        interval=rule.interval(len(numbers), video, group),
    )
    check(plan)
    done = sized.video(video.frames(numbers))
    if done.plan.source != plan.source:
        raise RequestError(
            f"the video has frames of {done.plan.source} pixels, but says {plan.source}; save it again"
        )
    return replace(done, plan=plan)
