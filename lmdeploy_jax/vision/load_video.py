"""Videos from whatever holds them: lists of frames, arrays, files, URLs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.access import MediaAccess
from lmdeploy_jax.vision.load import ImageSource, load_image, read_source
from lmdeploy_jax.vision.video import FPS, Video

VideoSource = str | Path | bytes | np.ndarray | Sequence[ImageSource]
# Containers whose demuxers read nothing but the file itself: playlists name other files and URLs.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
JPEGS = "data:video/jpeg;base64,"  # followed by frames with commas between, as LMDeploy writes them
MAX_FRAMES = 100_000
MAX_DECODED = 1 << 36  # pixels, as those of half an hour of 720p: minutes of work


def load_video(
    source: VideoSource,
    access: MediaAccess | None = None,
    fetched: Mapping[str, bytes | RequestError] | None = None,
    *,
    fps: float = FPS,
) -> Video:
    """A video, whose frames are decoded when they are read.

    source: frames in order, each a source of `load_image`; uint8 [T, H, W, 3]; a path, an http(s), file or
        data URL, or a file's bytes. Files need the extra `video` (PyAV).
    fetched: what `fetch.fetch` has given for URLs. fps: frames of a second, of frames that are given.
    Raises `RequestError`, naming the source and a remedy, for what `access` does not allow, and for what is
    no video. It may wait for a server: call it off the event loop.
    """
    access = access or MediaAccess()
    if isinstance(source, str) and _is_frames(source):
        frames = source.partition(",")[2].split(",")
        source = [f"data:image/jpeg;base64,{frame}" for frame in frames]
    if isinstance(source, np.ndarray):
        source = list(source)
    if not isinstance(source, str | Path | bytes):
        return _of_frames(source, access, fetched, fps)
    name, data = read_source(source, access, fetched or {})
    return _of_file(name, data, access)


def _is_frames(url: str) -> bool:
    """LMDeploy's documentation gives frames the type of the file that they are from: one in base64 has no
    comma.
    """
    return url.startswith(JPEGS) or (url.startswith("data:video/") and url.count(",") > 1)


def _of_frames(
    source: Any, access: MediaAccess, fetched: Mapping[str, bytes | RequestError] | None, fps: float
) -> Video:
    if not isinstance(source, Sequence) or not source:
        raise RequestError(
            f"{type(source).__name__} is no video: give a list of frames, a path, a URL or bytes."
        )

    def frames(numbers: Sequence[int]) -> Iterator[Image.Image]:
        return (load_image(source[number], access, fetched) for number in numbers)

    first = next(frames([0]))
    return Video(len(source), fps, first.height, first.width, frames, whole=True)


def _of_file(name: str, data: bytes, access: MediaAccess) -> Video:
    with _container(name, data) as container, _naming(name):
        stream = _stream(name, container)
        height, width = stream.codec_context.height, stream.codec_context.width
        if not 0 < height * width <= access.max_pixels:
            raise RequestError(
                f"{name}: frames of {width} × {height} pixels; they may have {access.max_pixels}."
            )
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not fps > 0:
            raise RequestError(f"{name}: the video does not say how fast it is. Give its frames as a list.")
        total = _number_of_frames(container)
    if not 0 < total <= MAX_FRAMES or total * height * width > MAX_DECODED:
        raise RequestError(
            f"{name}: {total} frames of {width} × {height} pixels are too many. Cut the video."
        )
    return Video(total, fps, height, width, partial(_decoded, name, data))


def _container(name: str, data: bytes) -> Any:
    try:
        import av
    except ImportError as error:
        raise RequestError(
            f"{name}: files of videos need PyAV: pip install 'lmdeploy_jax[video]', or give a list of frames."
        ) from error
    try:
        limits = {"format_whitelist": FORMATS, "protocol_whitelist": ""}
        return av.open(BytesIO(data), options=limits)
    except Exception as error:  # FFmpeg's errors have many types
        raise RequestError(f"{name}: {len(data)} bytes that are no video, or none of {FORMATS}.") from error


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever a broken file makes FFmpeg stumble over is an error that names it."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{name}: the video is damaged: {error}. Save it again.") from error


def _stream(name: str, container: Any) -> Any:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise RequestError(f"{name}: there is no video in it, or of a codec that nobody here knows.")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _number_of_frames(container: Any) -> int:
    """By its packets, since what the container says may be missing or wrong."""
    count = 0
    for packet in container.demux(video=0):
        count += packet.size > 0
        if count > MAX_FRAMES:
            break
    return count


def _decoded(name: str, data: bytes, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of some numbers; where the last ones cannot be decoded, the last that can be."""
    wanted, last = list(numbers), None
    with _container(name, data) as container, _naming(name):
        _stream(name, container)
        for number, frame in enumerate(container.decode(video=0)):
            while wanted and wanted[0] == number:
                last = frame.to_image()
                yield last
                wanted.pop(0)
            if not wanted:
                return
    if last is None:
        raise RequestError(f"{name}: no frame of the video can be decoded. Save it again.")
    yield from [last] * len(wanted)
