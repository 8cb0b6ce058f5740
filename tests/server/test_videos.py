"""Videos over HTTP, against a live server: what the pipeline sees, and nobody's video harms anybody else."""

from __future__ import annotations

import asyncio
import random
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from lmdeploy_jax import GenerationConfig, Pipeline, Response, pipeline
from tests import patience
from tests.engine.harness import config
from tests.engine.test_images import save
from tests.patience import PATIENCE
from tests.server.live import LiveServer, serving
from tests.vision.media import MediaSite, media_site, movie

ASK, COUNT = "w5 w6 w7", 4
GREEDY = GenerationConfig(max_new_tokens=COUNT, ignore_eos=True)
SMALL = {"min_pixels": 64, "max_pixels": 1024}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = save("qwen2_vl", tmp_path_factory.mktemp("watching") / "qwen2_vl")
    with pipeline(folder, config(tmp_path_factory.mktemp("xla")), progress=False) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def site() -> Iterator[MediaSite]:
    with media_site() as server:
        server.files["movie"] = movie()
        yield server


@pytest.fixture(scope="module")
def server(watching: Pipeline) -> Iterator[LiveServer]:
    allowed = ["127.0.0.1"]
    with serving(watching.frontend, image_fetch_timeout=PATIENCE, allowed_media_domains=allowed) as live:
        yield live


def part(url: object, **options: object) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **SMALL, **options}}


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": ASK}, *parts]}]


def as_data(data: bytes, kind: str = "mp4") -> str:
    return f"data:video/{kind};base64," + b64encode(data).decode()


def seen(pipe: Pipeline, **options: object) -> Response:
    """What the pipeline makes of the movie."""
    return pipe(asked({"type": "video", "video": movie(), **SMALL, **options}), GREEDY)


def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


FIELDS = {"model": "tiny-chat", "temperature": 0, "max_tokens": COUNT, "extra_body": {"ignore_eos": True}}


def test_openais_client_sends_videos(server: LiveServer, watching: Pipeline, site: MediaSite) -> None:
    expected = seen(watching)
    for url in (as_data(movie()), f"{site.url}/movie"):
        answer = client(server).chat.completions.create(messages=asked(part(url)), **FIELDS)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.input_token_len
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        *pieces, last = client(server).chat.completions.create(messages=asked(part(url)), **FIELDS, **stream)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
        assert last.usage.prompt_tokens == expected.input_token_len


def test_frames_in_one_url_and_options(server: LiveServer, watching: Pipeline) -> None:
    """Which are a video's own, or those of all videos."""
    held = BytesIO()
    Image.new("RGB", (64, 48), (90, 20, 200)).save(held, "JPEG")
    frame = b64encode(held.getvalue()).decode()

    def tokens(url: str, options: dict[str, object], **fields: object) -> int:
        body = {"messages": asked(part(url, **options)), "max_tokens": 1} | fields
        count: int = patience.post(server.url + CHAT, json=body).json()["usage"]["prompt_tokens"]
        return count

    frames = "data:video/jpeg;base64," + ",".join([frame] * 6)
    one = tokens("data:video/jpeg;base64," + ",".join([frame] * 2), {})
    assert tokens(frames, {}) - one == 2 * (tokens(frames, {}) - tokens(",".join(frames.split(",")[:5]), {}))
    few = {"num_frames": 2}
    data = as_data(movie())
    assert tokens(data, few) == tokens(data, {}, mm_processor_kwargs={"video": few})
    assert tokens(data, few) == tokens(data, {}, media_io_kwargs={"video": few | {"fps": 2}})
    assert tokens(data, few) == seen(watching, num_frames=2).input_token_len < seen(watching).input_token_len
    counted = patience.post(server.url + "/tokenize", json={"messages": asked(part(data))}).json()
    assert counted["count"] == seen(watching).input_token_len


def test_the_same_video_is_not_prefilled_again(server: LiveServer) -> None:
    said = asked(*[part(as_data(movie(format=kind))) for kind in ("mp4", "avi")] * 2)
    for cached in (False, True):
        body = {"messages": said, "max_tokens": 1}
        usage = patience.post(server.url + CHAT, json=body).json()["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) is cached


WRONG = [
    (as_data(b"no video at all"), "no video"),
    (as_data(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), "no video"),
    (as_data(movie()[:200]), "no video"),
    ("file:///etc/passwd", "may not be read"),
    ("http://localhost:1/a.mp4", "not among those that are allowed"),
    ("data:video/mp4;base64,%%%", "base64"),
    (None, "no video"),
    (7, "int is no video"),
]


@pytest.mark.parametrize(("url", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_is_wrong_names_the_part(url: object, told: str, server: LiveServer) -> None:
    answer = patience.post(server.url + CHAT, json={"messages": asked(part(url)), "max_tokens": 1})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages[0].content[1]")
    assert told in error["message"]


def test_other_protocols_and_models_say_that_they_take_none(
    server: LiveServer, seeing: Pipeline, live: LiveServer
) -> None:
    data = as_data(movie())
    shown = {"type": "input_video", "video_url": data}
    asks = {
        "/v1/responses": {"input": [{"role": "user", "content": [shown]}]},
        "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "video"}]}], "max_tokens": 1},
    }
    for path, body in asks.items():
        refused = patience.post(server.url + path, json=body)
        assert refused.status_code == 400
        assert "video" in refused.json()["error"]["message"]
    with serving(seeing.frontend) as images_only:
        for url in (images_only.url, live.url):
            refused = patience.post(url + CHAT, json={"messages": asked(part(data))})
            assert refused.status_code == 400
            assert "ideos are not supported" in refused.json()["error"]["message"]


@pytest.mark.parametrize("cases", [24, pytest.param(300, marks=pytest.mark.full)])
def test_no_damaged_video_harms_the_server(cases: int, server: LiveServer, watching: Pipeline) -> None:
    draw, whole = random.Random(5), [movie(), movie(format="avi"), movie(format="matroska")]

    def damaged() -> bytes:
        data = bytearray(draw.choice(whole))
        for _ in range(draw.choice([0, 1, 20])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[: draw.randrange(1, len(data) + 1)])

    async def send(client: httpx.AsyncClient, turns: asyncio.Semaphore) -> int:
        body = {"messages": asked(part(as_data(damaged()))), "max_tokens": 1}
        async with turns:
            answer = await client.post(CHAT, json=body)
        assert answer.status_code < 500, answer.text[:300]
        return answer.status_code

    async def main() -> list[int]:
        turns = asyncio.Semaphore(8)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*(send(client, turns) for _ in range(cases)))

    assert asyncio.run(main()).count(400) > cases / 3
    answer = client(server).chat.completions.create(messages=asked(part(as_data(movie()))), **FIELDS)
    assert answer.choices[0].message.content == seen(watching).text
