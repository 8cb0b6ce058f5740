"""Images from files, URLs, bytes and arrays; and what a stranger's URL may not reach."""

from __future__ import annotations

import base64
import ipaddress
import random
import threading
from contextlib import suppress
from io import BytesIO
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from PIL import Image

from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vision import load
from lmdeploy_jax.vision.access import MediaAccess
from lmdeploy_jax.vision.fetch import MAX_REDIRECTS, is_public
from lmdeploy_jax.vision.load import load_image
from tests.fuzz import cases
from tests.vision.media import LEVELS, PNG, bomb, encoded, media_site

STRANGER = MediaAccess(trusted=False)
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def site():
    with media_site() as server:
        yield server


@pytest.mark.parametrize(
    "source",
    [
        PNG,
        LEVELS,
        Image.fromarray(LEVELS),
        f"data:image/png;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:image/png;charset=utf-8;name=a.png;BASE64,{BASE64}",
        f"data:image/png;base64,{BASE64.replace('=', '%3D')}",
        f"data:image/png;base64,\n{BASE64[:40]}\r\n {BASE64[40:].rstrip('=')}",
        "data:image/png," + quote_from_bytes(PNG),
    ],
    ids=["bytes", "array", "image", "data", "bare", "parameters", "quoted", "lines", "percent"],
)
def test_every_source_gives_the_same_image(source):
    image = load_image(source, STRANGER)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), LEVELS)


def test_base64_is_decoded_in_pieces(monkeypatch):
    """Wherever they end: within a quartet, a line, the padding."""
    for piece in range(1, 9):
        monkeypatch.setattr(load, "_PIECE", piece)
        for data in (
            BASE64,
            BASE64.rstrip("="),
            "\n".join(BASE64[i : i + 5] for i in range(0, len(BASE64), 5)),
        ):
            assert load_image(f"data:image/png;base64,{data}", STRANGER).size == (7, 5)


def test_files_by_path_and_url(tmp_path):
    path = tmp_path / "an image.png"
    path.write_bytes(PNG)
    for source in (path, str(path), path.as_uri()):
        np.testing.assert_array_equal(np.asarray(load_image(source)), LEVELS)
        with pytest.raises(RequestError, match="allowed-local-media-path"):
            load_image(source, STRANGER)
        within = MediaAccess(trusted=False, allowed_local_media_path=tmp_path)
        np.testing.assert_array_equal(np.asarray(load_image(source, within)), LEVELS)


def test_a_file_outside_of_the_allowed_folder_is_not_even_looked_for(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    access = MediaAccess(trusted=False, allowed_local_media_path=allowed)
    (allowed / "loop.png").symlink_to(allowed / "loop.png")
    for path in ("../secret.png", "../missing.png", "link.png"):
        with pytest.raises(RequestError, match="may not be read"):
            load_image(allowed / path, access)
    for path in ("missing.png", "loop.png", "a\0b", "a" * 10**5):
        with pytest.raises(RequestError, match="cannot be read") as caught:
            load_image(allowed / path, access)
        assert len(str(caught.value)) < 600


def test_a_url_and_its_redirects(site):
    for path in ("png", "1", str(MAX_REDIRECTS)):
        np.testing.assert_array_equal(np.asarray(load_image(f"{site.url}/{path}")), LEVELS)
    with pytest.raises(RequestError, match="redirects"):
        load_image(f"{site.url}/{MAX_REDIRECTS + 1}")
    for path, told in (("missing", "answered 404"), ("text", "no image")):
        with pytest.raises(RequestError, match=told):
            load_image(f"{site.url}/{path}")


def test_within_a_running_event_loop(site):
    """As in a notebook's cell."""
    import asyncio

    async def cell():
        return load_image(f"{site.url}/png")

    assert asyncio.run(cell()).size == (7, 5)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "127.0.0.1.",
        "①②⑦.0.0.1",
        "a@127.0.0.1",
        "8.8.8.8\\\\@127.0.0.1",
    ],
)
def test_a_stranger_reaches_nothing_on_this_machine(site, host):
    site.asked.clear()
    url = f"http://{host}:{site.server_address[1]}/png"
    with pytest.raises(RequestError, match=r"no public address|cannot be fetched|must begin with"):
        load_image(url, STRANGER)
    assert site.asked == []


def test_a_stranger_reaches_the_hosts_that_are_named(site):
    access = MediaAccess(trusted=False, allowed_media_domains=["127.0.0.1"])
    assert load_image(f"{site.url}/png", access).size == (7, 5)
    with pytest.raises(RequestError, match=r"'example\.org' is not among"):
        load_image("http://example.org/a.png", access)
    for away in ("http://localhost:1/", "file:///etc/passwd", "gopher://x"):
        site.away = away
        with pytest.raises(RequestError, match=r"not among those|must begin with http"):
            load_image(f"{site.url}/away", access)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("2001:0:a00:1::", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_size_and_time_are_bounded(site):
    with pytest.raises(RequestError, match="more than 100000 bytes"):
        load_image(f"{site.url}/endless", MediaAccess(max_bytes=100_000))
    assert site.hung_up.wait(60)
    with pytest.raises(RequestError, match=r"within 0\.2 s"):
        load_image(f"{site.url}/slow", MediaAccess(fetch_timeout=0.2))
    small = MediaAccess(max_bytes=len(PNG) - 1)
    for source in (PNG, f"data:image/png;base64,{BASE64}"):
        with pytest.raises(RequestError, match="more than"):
            load_image(source, small)


def test_a_look_up_that_hangs_holds_up_nobody(monkeypatch):
    let_go = threading.Event()

    def getaddrinfo(*args, **kwargs):
        let_go.wait()
        raise OSError("nobody answers")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    with pytest.raises(RequestError, match=r"within 0\.1 s"):
        load_image("http://example.org/a.png", MediaAccess(fetch_timeout=0.1))
    let_go.set()


@pytest.mark.parametrize("size", [(10_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_they_are_decoded(size):
    with pytest.raises(RequestError, match="pixels"):
        load_image(bomb(*size), STRANGER)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_files_are_the_clients_fault(kind):
    whole = encoded(kind, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert load_image(whole).size == (64, 64)
    for kept in (0, 1, 10, 40, len(whole) // 2):
        with pytest.raises(RequestError, match=r"damaged|no image"):
            load_image(whole[:kept])


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("data:image/png;base64,%%%", "base64"),
        ("data:image/png;base64,AAAAAAA=AAAA", "padding"),
        ("data:image/png;base64,ÄÄÄÄ", "base64"),
        ("data:image/png;base64", "comma"),
        ("data:,", "0 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (np.zeros((2, 2, 3), np.float32), "uint8"),
        (np.zeros((0, 2, 3), np.uint8), "uint8"),
        (Image.new("F", (2, 2)), "mode F"),
        ("http://", "name a host"),
        ("http://[", "cannot be fetched"),
        ("/no/such.png", "/no/such.png"),
        ("a\0b", "cannot be read"),
        ("/dev/zero", "no regular file"),
        (".", "no regular file"),
    ],
)
def test_errors_name_the_fault(source, told):
    with pytest.raises(RequestError, match=told) as caught:
        load_image(source)
    assert len(str(caught.value)) < 600


def test_no_error_repeats_a_data_url():
    """A log of megabytes helps nobody."""
    with pytest.raises(RequestError) as caught:
        load_image("data:image/png;base64," + "A" * 10**6)
    assert len(str(caught.value)) < 300


KINDS = [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"),
         ("BMP", "RGB"), ("TIFF", "RGBA"), ("WEBP", "RGBA"), ("PPM", "RGB")]  # fmt: skip


def saved(kind: str, mode: str) -> bytes:
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    deep = mode == "I;16"
    file = BytesIO()
    image = Image.fromarray(levels[..., 0].astype(np.uint16) << 8 if deep else levels)
    (image if deep else image.convert(mode)).save(file, kind)
    return file.getvalue()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off or put in, most of them near the beginning."""
    made = bytearray(data)
    for _ in range(draw.choice([0, 1, 2, 5, 20])):
        at = draw.randrange(len(made) + 1 if draw.random() < 0.5 else min(len(made) + 1, 64))
        match draw.randrange(4):
            case 0:
                made[at : at + 1] = draw.randbytes(1)
            case 1:
                made[at : at + 4] = b"\xff\xff\xff\x7f"
            case 2:
                made[at:at] = draw.randbytes(5)
            case 3:
                del made[at:]
    return bytes(made)


@cases(5000)
@pytest.mark.filterwarnings("ignore")
def test_no_broken_image_is_more_than_a_refusal(cases):
    draw, files = random.Random(0), [saved(*kind) for kind in KINDS]
    loaded = 0
    for _ in range(cases):
        with suppress(RequestError):
            loaded += load_image(mutated(draw, draw.choice(files))).mode == "RGB"
    assert 0 < loaded < cases
