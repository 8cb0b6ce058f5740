"""Which frames of a video are seen, how large, and when; files, and what is said of broken ones."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmdeploy_jax import vl
from lmdeploy_jax.converters.vision_config import read_vision
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.access import MediaAccess
from lmdeploy_jax.vision.load_video import load_video
from lmdeploy_jax.vision.resize import SmartResize
from lmdeploy_jax.vision.video import Video, VideoRule, prepare_video
from tests.fuzz import cases
from tests.vision.media import movie
from tests.vision.oracle import save_checkpoint
from tests.vision.pictures import picture

QWEN2, QWEN3 = VideoRule(128 * 784, 768 * 784), VideoRule(4096, 25165824, dated=True)


def source(total: int, fps: float) -> Video:
    return Video(total, fps, 60, 80, lambda numbers: iter([picture(60, 80)] * len(numbers)))


def theirs(total: int, fps: float, wanted: float) -> list[int]:
    """As `Qwen2VLVideoProcessor.sample_frames` has it, whose module needs torchvision."""
    most = min(768, total) // 2 * 2
    count = int(min(max(total / fps * wanted, 4), most, total) // 2 * 2)
    return torch.arange(0, total, total / count).int().tolist()


@pytest.mark.parametrize(
    ("total", "fps"), [(2, 24), (5, 24), (49, 24), (100, 25), (1000, 29.97), (40000, 60)]
)
@pytest.mark.parametrize("wanted", [0.5, 2, 7])
def test_frames_are_sampled_as_transformers_does(total: int, fps: float, wanted: float) -> None:
    assert QWEN2.sample(source(total, fps), {"fps": wanted}, 2) == theirs(total, fps, wanted)
    count = min(max(int(total / fps * wanted), 4), 768, total)
    linear = np.linspace(0, total - 1, count).round().astype(int).tolist()
    assert QWEN3.sample(source(total, fps), {"fps": wanted}, 2) == linear


def test_a_number_of_frames() -> None:
    assert QWEN2.sample(source(10, 5), {"num_frames": 4}, 2) == [0, 2, 5, 7]
    assert QWEN3.sample(source(10, 5), {"num_frames": 3}, 2) == [0, 4, 9]
    by_time = QWEN2.sample(source(100, 5), {"fps": 0.4}, 2)
    assert QWEN2.sample(source(100, 5), {"fps": 0.4, "num_frames": 90}, 2) == by_time
    few = {"fps": 2, "num_frames": 8}
    assert QWEN2.sample(source(100, 5), few, 2) == QWEN2.sample(source(100, 5), {"num_frames": 8}, 2)
    wrong = [
        ({"num_frames": 11}, "num_frames is 11, but the video has 10"),
        ({"num_frames": 2.5}, "num_frames is 2.5; it must be a positive integer"),
        ({"fps": -1}, "fps is -1; it must be a positive number"),
        ({"detail": "low"}, "video option detail is unknown"),
    ]
    for options, said in wrong:
        with pytest.raises(RequestError, match=said):
            QWEN2.with_options(options).sample(source(10, 5), options, 2)


def test_times_and_intervals() -> None:
    """Frames are dated by their numbers in the source; the sampled rate counts for positions."""
    assert QWEN3.times([0, 4, 9], 5.0, 2) == (0.4, 1.8)
    assert QWEN2.times([0, 4], 5.0, 2) == ()
    timed = VideoRule(1, 2, tokens_per_second=2)
    assert timed.interval(4, source(10, 5), 2) == 2 * 2 / (4 / 10 * 5)
    assert QWEN2.interval(4, source(10, 5), 2) == 1.0


def test_bounds_are_a_frames_or_those_of_all() -> None:
    images = SmartResize(28, 3136, 12845056)
    assert QWEN2.resize(images, 4, 2).plan(1080, 1920).height == 560  # 768 tokens a frame
    assert QWEN2.resize(images, 768, 2).plan(1080, 1920).height == 336  # an even share of the budget
    plan = QWEN3.resize(SmartResize(32, 65536, 2**24), 768, 2).plan(1080, 1920)
    assert 768 * plan.height * plan.width <= 25165824 < 768 * (plan.height + 32) * (plan.width + 32)


def test_a_video_processor_has_a_file_of_its_own(tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_vl", tmp_path)
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 4096, "longest_edge": 8192}})
    )
    _, config = read_vision(folder)
    assert config.video == VideoRule(4096, 8192, dated=True)
    assert read_vision(save_checkpoint("llava", tmp_path / "llava"))[1].video is None


FRAMES = [picture(48, 64, seed=seed) for seed in range(12)]


def jpegs(count: int) -> str:
    """As LMDeploy's `encode_video_base64` writes frames."""
    found = []
    for frame in FRAMES[:count]:
        held = BytesIO()
        frame.save(held, "JPEG")
        found.append(b64encode(held.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(found)


def test_lists_of_frames() -> None:
    stack = np.stack([np.asarray(frame) for frame in FRAMES])
    for given in (FRAMES, tuple(FRAMES), stack):
        video = load_video(given, fps=3)
        assert (video.total, video.fps, video.height, video.width, video.whole) == (12, 3, 48, 64, True)
        (frame,) = video.frames([7])
        assert np.array_equal(frame, FRAMES[7])
        assert QWEN2.sample(video, {}, 2) == list(range(12))
    assert load_video(jpegs(3)).total == 3
    url = "https://example.org/one.png"
    assert load_video([url], fetched={url: picture_bytes()}).height == 48
    with pytest.raises(RequestError, match="of a list all are taken"):
        QWEN2.sample(video, {"num_frames": 4}, 2)
    for wrong in ([], 5, ["/no/such.png"]):
        with pytest.raises(RequestError):
            load_video(wrong)  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    data = movie()
    path = tmp_path / "movie.mp4"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + b64encode(data).decode()
    for given in (data, path, str(path), url):
        video = load_video(given)
        assert (video.total, video.fps, video.height, video.width, video.whole) == (12, 5.0, 48, 64, False)
    levels = [np.asarray(frame).mean() / 20 for frame in video.frames([0, 5, 5, 11])]
    np.testing.assert_allclose(levels, [0, 5, 5, 11], atol=0.3)
    assert QWEN2.sample(video, {}, 2) == [0, 3, 6, 9]


def test_frames_under_lmdeploys_name() -> None:
    frames, where = vl.load_video(movie(), num_frames=4)
    assert (frames.shape, frames.dtype) == ((4, 48, 64, 3), np.uint8)
    assert where["frames_indices"] == [0, 3, 7, 11]
    assert (where["total_num_frames"], where["fps"], where["duration"]) == (12, 5.0, 2.4)
    assert load_video(frames, fps=where["sampled_fps"]).fps == 4 / 2.4
    assert len(vl.load_video(movie(), fps=1)[0]) == 2


@pytest.mark.parametrize("kind", ["jpeg", "mp4"])
def test_frames_in_base64_under_lmdeploys_name(kind: str) -> None:
    """Its documentation gives them the type of the file."""
    url = f"data:video/{kind};base64," + vl.encode_video_base64(movie(), num_frames=4)
    video = load_video(url)
    assert (video.total, video.height, video.width, video.whole) == (4, 48, 64, True)
    levels = [np.asarray(frame).mean() / 20 for frame in video.frames(range(4))]
    np.testing.assert_allclose(levels, [0, 3, 7, 11], atol=0.3)


def test_broken_files(tmp_path: Path) -> None:
    data = movie()
    with pytest.raises(RequestError, match="may have 1000"):
        load_video(data, MediaAccess(max_pixels=1000))
    with pytest.raises(RequestError, match="may not be read"):
        load_video(tmp_path / "movie.mp4", MediaAccess(trusted=False))
    for broken in (b"", data[:100], b"\0" * 1000, picture_bytes()):
        with pytest.raises(RequestError, match=r"no video|damaged|too many|not say"):
            list(load_video(broken).frames([0]))


@cases(1000)
def test_damaged_files(cases: int) -> None:
    """Whatever a byte is changed to, a file gives frames or an error of ours."""
    rng = random.Random(0)
    kinds = (("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"))
    files = [movie(*kind) for kind in kinds]
    decoded = 0
    for number in range(cases):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(RequestError):
            video = load_video(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
            decoded += len(list(video.frames([0, video.total - 1])))
    assert 0 < decoded < 2 * cases


def picture_bytes() -> bytes:
    held = BytesIO()
    FRAMES[0].save(held, "PNG")
    return held.getvalue()


def test_playlists_read_no_other_file(tmp_path: Path) -> None:
    """FFmpeg would follow what they name, to files and to hosts."""
    (tmp_path / "movie.mp4").write_bytes(movie())
    lists = [
        f"ffconcat version 1.0\nfile '{tmp_path}/movie.mp4'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/movie.mp4\n#EXT-X-ENDLIST\n",
    ]
    for text in lists:
        path = tmp_path / "list"
        path.write_text(text)
        for given in (text.encode(), path):
            with pytest.raises(RequestError, match="no video"):
                load_video(given)


def test_a_video_that_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    _, config = read_vision(save_checkpoint("qwen2_vl", tmp_path))

    def never(numbers: Any) -> Any:
        raise AssertionError("decoded")

    def check(plan: Any) -> None:
        raise RequestError(f"{plan.views} views")

    rule, video = config.video, Video(8, 2.0, 40, 40, never, whole=True)
    assert rule is not None
    with pytest.raises(RequestError, match="4 views"):
        prepare_video(config.processor, rule, video, {}, check)
