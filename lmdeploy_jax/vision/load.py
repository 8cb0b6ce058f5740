"""Images from whatever holds them: files, URLs, bytes, arrays."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.logs import shortened
from lmdeploy_jax.vision.access import MediaAccess
from lmdeploy_jax.vision.pixels import to_rgb

# Others have decoders that start programs (EPS), or that nobody needs and few have looked at.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ImageSource = str | Path | bytes | Image.Image | np.ndarray
_SHOWN = 200  # characters of a source in an error
_PIECE = 1 << 18  # characters of base64 that are decoded in one call


def is_url(source: Any) -> bool:
    """Whether a source of an image is an http or https URL, which a server must be asked for."""
    return isinstance(source, str) and source[:8].partition(":")[0].lower() in ("http", "https")


def load_image(
    source: ImageSource,
    access: MediaAccess | None = None,
    fetched: Mapping[str, bytes | RequestError] | None = None,
) -> Image.Image:
    """The image in 8-bit RGB, turned as its EXIF data say, transparent parts on white.

    source: a path, an http(s), file or data URL, a file's bytes, a PIL image, or uint8 [H, W],
        [H, W, 3] or [H, W, 4].
    fetched: what `fetch.fetch` has given for URLs.
    Raises `RequestError`, naming the source and a remedy, for what `access` does not allow, and for what is
    no image. It may wait for a server: call it off the event loop.
    """
    access = access or MediaAccess()
    name, given = _opened(source, access, fetched or {})
    width, height = given.size
    if width * height > access.max_pixels:
        raise RequestError(
            f"{name}: {width} × {height} pixels are more than {access.max_pixels}. Send a smaller image."
        )
    try:
        return to_rgb(given)
    except RequestError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise RequestError(f"{name}: the image is damaged: {error}. Save it again.") from error


def _opened(
    source: ImageSource, access: MediaAccess, fetched: Mapping[str, bytes | RequestError]
) -> tuple[str, Image.Image]:
    """What to call the source in an error, and its image, whose pixels have not been decoded yet."""
    if isinstance(source, Image.Image):
        return "the image", source
    if isinstance(source, np.ndarray):
        return "the array", _from_array(source)
    if not isinstance(source, str | Path | bytes):
        raise RequestError(
            f"{type(source).__name__} is no image: give a path, a URL, bytes, a PIL image or an array."
        )
    name, data = read_source(source, access, fetched)
    return name, _decoder(data, name)


def read_source(
    source: str | Path | bytes, access: MediaAccess, fetched: Mapping[str, bytes | RequestError]
) -> tuple[str, bytes]:
    """What to call the source of an image or a video in an error, and its bytes; see `load_image`."""
    if is_url(source):
        name, data = shortened(str(source), _SHOWN), _body(str(source), access, fetched)
    else:
        name, data = ("the bytes", source) if isinstance(source, bytes) else _read(source, access)
    access.check_size(len(data), name)
    return name, data


def _from_array(levels: np.ndarray) -> Image.Image:
    shaped = levels.ndim == 2 or (levels.ndim == 3 and levels.shape[2] in (3, 4))
    if levels.dtype != np.uint8 or not shaped or not levels.size:
        raise RequestError(
            f"an array of {levels.dtype} {list(levels.shape)} is no image: give uint8 [H, W], [H, W, 3] or "
            "[H, W, 4]."
        )
    return Image.fromarray(levels)


def _decoder(data: bytes, name: str) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without some
    try:
        return Image.open(BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name}: {error} Send a smaller image.") from error
    except Exception as error:
        readable = ", ".join(formats)
        raise RequestError(f"{name}: {len(data)} bytes that are no image, or none of {readable}.") from error


def _body(url: str, access: MediaAccess, fetched: Mapping[str, bytes | RequestError]) -> bytes:
    if url not in fetched:
        from lmdeploy_jax.vision.fetch import fetch  # aiohttp is loaded with the first URL

        fetched = fetch([url], access)
    found = fetched[url]
    if isinstance(found, RequestError):
        raise found
    return found


def _read(source: str | Path, access: MediaAccess) -> tuple[str, bytes]:
    """A name for the source, and its bytes."""
    scheme, colon, _ = source.partition(":") if isinstance(source, str) else ("", "", "")
    match scheme.lower() if colon else None:
        case "data":
            return "the data URL", _from_data_url(str(source), access)
        case "file":
            return _from_file(Path(url2pathname(urlsplit(str(source)).path)), access)
    return _from_file(Path(source), access)


def _from_data_url(url: str, access: MediaAccess) -> bytes:
    """RFC 2397: data:[type][;parameter=value]...[;base64],data."""
    comma = url.find(",")
    if comma < 0:
        raise RequestError("the data URL has no comma: write data:image/png;base64,DATA.")
    access.check_size((len(url) - comma - 1) * 3 // 4, "the data URL")
    if url[:comma].rpartition(";")[2].strip().lower() != "base64":
        return unquote_to_bytes(url[comma + 1 :])
    if "%" in url:
        url, comma = unquote_to_bytes(url[comma + 1 :]).decode("latin-1"), -1
    try:
        return _from_base64(url, comma + 1)
    except ValueError as error:
        raise RequestError(f"the data URL is not valid base64: {error}.") from error


def _from_base64(text: str, start: int) -> bytes:
    """Of base64 from `start` on, as browsers take it: in lines, and without padding. Raises ValueError.

    Piece by piece, since each call holds Python's lock: who answers others meanwhile needs it too.
    """
    decoded, rest = bytearray(), b""
    for at in range(start, len(text), _PIECE):
        rest += text[at : at + _PIECE].encode("ascii").translate(None, b" \t\n\f\r")
        whole = max(0, len(rest) - 4) // 4 * 4  # the last quartet may be padded
        if b"=" in rest[:whole]:
            raise ValueError("data after the padding")
        decoded += base64.b64decode(rest[:whole], validate=True)
        rest = rest[whole:]
    rest = rest.rstrip(b"=")
    decoded += base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)
    return bytes(decoded)


def _from_file(path: Path, access: MediaAccess) -> tuple[str, bytes]:
    name = shortened(f"the file {str(path)!r}", _SHOWN)
    try:
        if not access.allows(path):
            raise RequestError(
                f"{name} may not be read. Send the file itself as a data URL, or start the server with "
                "--allowed-local-media-path."
            )
        if path.exists() and not path.is_file():  # a device never ends
            raise RequestError(f"{name} is no regular file. Give an image.")
        access.check_size(path.stat().st_size, name)
        return name, path.read_bytes()
    except RequestError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{name} cannot be read: {reason}. Check the path.") from error
