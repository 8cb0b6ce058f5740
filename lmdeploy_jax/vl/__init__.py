"""Images and videos for prompts, under LMDeploy's names."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import numpy as np

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision.load import ImageSource, load_image
from lmdeploy_jax.vision.load_video import VideoSource
from lmdeploy_jax.vision.load_video import load_video as open_video
from lmdeploy_jax.vl.constants import IMAGE_TOKEN

__all__ = ["IMAGE_TOKEN", "encode_image_base64", "encode_video_base64", "load_image", "load_video"]


def load_video(
    source: VideoSource, *, num_frames: int = 32, fps: float | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames of a video that stand equally far apart, uint8 [T, H, W, 3], and where they are from.

    num_frames: most of them; fps: most of them in a second. source: see `vision.load_video`.
    The second says the source's `total_num_frames`, `fps` and `duration` in seconds, `frames_indices`, and
    the `sampled_fps` that goes with the frames into a prompt: {"type": "video", "video": frames, "fps": ...}.
    Raises `RequestError` for what is no video.
    """
    video = open_video(source)
    duration = video.total / video.fps
    count = min(num_frames, video.total, int(duration * fps) if fps is not None else video.total)
    numbers = np.linspace(0, video.total - 1, max(count, 1), dtype=int).tolist()
    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in video.frames(numbers)])
    return frames, {
        "total_num_frames": video.total,
        "fps": video.fps,
        "duration": duration,
        "frames_indices": numbers,
        "sampled_fps": len(numbers) / duration,
    }


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


def encode_video_base64(source: VideoSource, format: str = "JPEG", **options: Any) -> str:
    """A video's frames as files in base64 with commas between, a URL behind "data:video/jpeg;base64,".

    source, options: see `load_video`; format: see `encode_image_base64`. Raises `RequestError` as both do.
    """
    frames, _ = load_video(source, **options)
    return ",".join(encode_image_base64(frame, format) for frame in frames)
