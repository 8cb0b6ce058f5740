"""Images over HTTP: every protocol sees what the pipeline sees, and nobody's image harms anybody else."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import random
import sys
import threading
from base64 import b64encode

import anthropic
import httpx
import openai
import psutil
import pytest
from PIL import Image

from lmdeploy_jax import GenerationConfig
from tests import patience
from tests.patience import PATIENCE
from tests.server.live import begun, serving
from tests.server.test_broken_requests import check_unharmed
from tests.vision.media import LEVELS, PNG, bomb, encoded, media_site

ASK, COUNT = "w5 w6 w7", 8
GREEDY = GenerationConfig(max_new_tokens=COUNT, ignore_eos=True)
DATA = "data:image/png;base64," + b64encode(PNG).decode()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def site():
    with media_site() as server:
        yield server


@pytest.fixture(scope="module")
def sees(seeing, tmp_path_factory):
    """A server that may fetch from this machine, and read `folder`."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(PNG)
    allowed = {"allowed_media_domains": ["127.0.0.1"], "allowed_local_media_path": str(folder)}
    with serving(seeing.frontend, image_fetch_timeout=PATIENCE, **allowed) as live:
        live.folder = folder
        yield live


@pytest.fixture(scope="module")
def expected(seeing):
    return seeing((ASK, Image.fromarray(LEVELS)), GREEDY)


def asked(url: object, **options: object) -> list[dict]:
    """A conversation about an image, in OpenAI's form."""
    image = {"type": "image_url", "image_url": {"url": url, **options}}
    return [{"role": "user", "content": [{"type": "text", "text": ASK}, image]}]


def chat(live, url, messages=None, **options):
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
    fields = {"model": "tiny-chat", "temperature": 0, "max_tokens": COUNT, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(messages=messages or asked(url, **options), **fields)
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def chat_stream(live, url):
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
    fields = {"model": "tiny-chat", "temperature": 0, "max_tokens": COUNT, "extra_body": {"ignore_eos": True}}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = client.chat.completions.create(messages=asked(url), **fields, **options)
    return "".join(piece.choices[0].delta.content or "" for piece in pieces), last.usage.prompt_tokens


def responses(live, url):
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
    image = {"type": "input_image", "image_url": url, "detail": "auto"}
    said = [{"role": "user", "content": [{"type": "input_text", "text": ASK}, image]}]
    answer = client.responses.create(model="tiny-chat", input=said, temperature=0, max_output_tokens=COUNT)
    return answer.output_text, answer.usage.input_tokens


def claude(live):
    return anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)


def block(url: str) -> dict:
    source = {"type": "url", "url": url}
    if url.startswith("data:"):
        source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    return {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}


def messages(live, url):
    said = [{"role": "user", "content": [{"type": "text", "text": ASK}, block(url)]}]
    fields = {"model": "tiny-chat", "max_tokens": COUNT, "messages": said, "extra_body": {"temperature": 0}}
    answer = claude(live).messages.create(**fields)
    return answer.content[0].text, answer.usage.input_tokens + answer.usage.cache_read_input_tokens


@pytest.mark.parametrize("ask", [chat, chat_stream, responses, messages])
def test_the_official_clients_send_images(ask, sees, site, expected):
    for url in (DATA, f"{site.url}/png"):
        assert ask(sees, url) == (expected.text, expected.input_token_len)


def test_a_tool_may_show_an_image(sees, seeing):
    """A result of a tool of Anthropic's, and of the Responses protocol."""
    shown = [{"type": "text", "text": ASK}, block(DATA)]
    call = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    turns = [
        {"role": "user", "content": "w9"},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": shown}]},
    ]
    count = claude(sees).messages.count_tokens
    with_image = count(model="tiny-chat", messages=turns).input_tokens
    turns[2]["content"][0]["content"] = shown[:1]
    image = (
        seeing((ASK, Image.fromarray(LEVELS)), GREEDY).input_token_len - seeing(ASK, GREEDY).input_token_len
    )
    assert image > 0
    assert with_image == count(model="tiny-chat", messages=turns).input_tokens + image
    parts = [{"type": "input_text", "text": ASK}, {"type": "input_image", "image_url": DATA}]
    said = [
        {"role": "user", "content": "w9"},
        {"type": "function_call", "call_id": "t", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "t", "output": parts},
    ]
    answer = patience.post(sees.url + "/v1/responses", json={"input": said, "max_output_tokens": 1})
    assert answer.json()["usage"]["input_tokens"] == with_image


def test_tokens_are_counted_with_images(sees, expected):
    said = [{"role": "user", "content": [{"type": "text", "text": ASK}, block(DATA)]}]
    counted = claude(sees).messages.count_tokens(model="tiny-chat", messages=said)
    assert counted.input_tokens == expected.input_token_len
    tokens = patience.post(sees.url + "/tokenize", json={"messages": asked(DATA)}).json()
    assert tokens["count"] == len(tokens["tokens"]) == expected.input_token_len


def test_a_response_goes_on_from_one_with_an_image(sees):
    client = openai.OpenAI(base_url=sees.url + "/v1", api_key="none", max_retries=0)
    image = {"type": "input_image", "image_url": DATA, "detail": "auto"}
    first = client.responses.create(
        model="tiny-chat", input=[{"role": "user", "content": [image]}], max_output_tokens=2
    )
    fields = {"model": "tiny-chat", "input": ASK, "max_output_tokens": 2}
    second = client.responses.create(**fields, previous_response_id=first.id)
    alone = client.responses.create(**fields)
    assert second.usage.input_tokens > first.usage.input_tokens + alone.usage.input_tokens


def test_options_of_all_images(sees):
    """And of one, which hold before them."""
    wide = "data:image/png;base64," + b64encode(encoded("PNG", Image.new("RGB", (300, 100)))).decode()

    def tokens(url_options, **fields):
        body = {"messages": asked(wide, **url_options), "max_tokens": 1} | fields
        return patience.post(sees.url + CHAT, json=body).json()["usage"]["prompt_tokens"]

    one = {"max_dynamic_patch": 1}
    assert tokens({"detail": "low"}) > tokens(one) == tokens({}, mm_processor_kwargs={"image": one})
    assert tokens({"max_dynamic_patch": 6}, mm_processor_kwargs={"image": one}) == tokens({"detail": "low"})
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        wrong = patience.post(sees.url + CHAT, json={"messages": asked(wide), name: {"audio": {"fps": 1}}})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, name)


def test_files_of_the_folder_that_is_allowed(sees, seeing, expected):
    path = sees.folder / "a.png"
    assert chat(sees, path.as_uri())[0] == expected.text
    with serving(seeing.frontend) as strict, pytest.raises(openai.BadRequestError, match="may not be read"):
        chat(strict, path.as_uri())


def test_bodies_of_64_mb_where_images_are_taken(sees):
    assert b" 413 " in begun(sees.url, (64 << 20) + 1)
    assert b" 413 " not in begun(sees.url, 64 << 20)


WRONG = [
    ([*asked(DATA), *asked("data:image/png;base64,AAAA")], "messages[1].content[1]", "no image"),
    (asked("data:image/png;base64,%%%"), "messages[0].content[1]", "base64"),
    (asked("file:///etc/passwd"), "messages[0].content[1]", "may not be read"),
    (asked("/etc/passwd"), "messages[0].content[1]", "may not be read"),
    (asked("http://localhost:1/a.png"), "messages[0].content[1]", "not among those that are allowed"),
    (asked(DATA, detail="most"), "messages[0].content[1]", "detail is 'most'"),
    (asked(DATA, colour=1), "messages[0].content[1]", "image option colour is unknown"),
    (asked(5), "messages[0].content[1]", "int is no image"),
    (asked(None), "messages[0].content[1]", "no image"),
    ([{"role": "system", "content": asked(DATA)[0]["content"]}, *asked(DATA)], "messages[0]", "'system'"),
]


@pytest.mark.parametrize(("said", "param", "told"), WRONG)
def test_what_is_wrong_names_the_part(said, param, told, sees):
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        chat(sees, None, messages=said)
    error = caught.value.body
    assert param in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("ask", [chat, responses, messages])
def test_a_text_model_says_that_it_takes_no_images(ask, live):
    with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match=r"\[1\]: images are not"):
        ask(live, DATA)


@pytest.mark.parametrize("ask", [chat, responses, messages])
def test_strangers_reach_nothing_on_this_machine(ask, seeing, site):
    site.asked.clear()
    with serving(seeing.frontend) as live:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(
                (openai.BadRequestError, anthropic.BadRequestError), match="no public address"
            ):
                ask(live, f"http://{host}:{site.server_address[1]}/png")
    assert site.asked == []


def test_more_images_than_the_context_holds(sees):
    many = asked(DATA)[0]["content"] * 200
    with pytest.raises(
        openai.BadRequestError, match=r"This model's maximum context length is \d+ tokens.* tokens of images"
    ):
        chat(sees, None, messages=[{"role": "user", "content": many}])


def test_a_slow_media_server_delays_nobody_else(sees, site, expected):
    """More requests wait for it than the event loop has threads for everybody else."""
    site.asked.clear()
    body = {"messages": asked(f"{site.url}/slow"), "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=sees.url, timeout=PATIENCE) as client:
            waiting = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(40)]
            while len(site.asked) < len(waiting):
                await asyncio.sleep(0.01)
            quick = {"messages": [{"role": "user", "content": ASK}], "max_tokens": COUNT, "stream": True}
            text = await client.post(CHAT, json=quick)
            seen = await client.post(CHAT, json=body | {"messages": asked(DATA)})
            assert text.text.endswith("[DONE]\n\n")
            assert seen.json()["choices"][0]["message"]["content"] == expected.text
            assert not any(task.done() for task in waiting)
            site.let_go.set()
            return await asyncio.gather(*waiting)

    for answer in asyncio.run(main()):
        assert answer.json()["choices"][0]["message"]["content"] == expected.text


def test_clients_that_leave_while_the_engine_encodes(sees, seeing, monkeypatch):
    """Two at once, one with several answers: nothing of theirs runs on, and slots and pages are back."""
    engine = seeing.frontend.engine
    encoder, entered, let_go = engine._runner._steps._encoder, threading.Event(), threading.Event()
    prepare, submit, abort = encoder.prepare, engine.submit, engine.abort
    come, left = [], []

    def held(step):
        prepare(step)
        if step.encoder_runs:
            entered.set()
            assert let_go.wait(PATIENCE)

    def submitted(request):
        submit(request)
        come.append(request.request_id)

    def aborted(request_id, index=None):
        left.append(request_id)
        abort(request_id, index)

    monkeypatch.setattr(encoder, "prepare", held)
    monkeypatch.setattr(engine, "submit", submitted)
    monkeypatch.setattr(engine, "abort", aborted)
    unseen = Image.effect_noise((60, 40), 90).convert("RGB")
    body = {"messages": asked("data:image/png;base64," + b64encode(encoded("PNG", unseen)).decode())}

    async def main() -> None:
        async with httpx.AsyncClient(base_url=sees.url, timeout=PATIENCE) as client:
            fields = ({"stream": True}, {"n": 3, "cache_salt": "other"})
            sent = [asyncio.create_task(client.post(CHAT, json=body | each)) for each in fields]
            while not entered.is_set() or len(come) < 2:
                await asyncio.sleep(0.002)
            for each in sent:
                each.cancel()
            while not set(come) <= set(left):
                await asyncio.sleep(0.002)
            let_go.set()

    asyncio.run(main())
    patience.wait_until(lambda: not engine.scheduler.has_work and not engine._flight)
    engine.scheduler.check_integrity()
    assert engine.scheduler.cache.pool.used == 0
    check_unharmed(sees, seeing)


HOSTS = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "169.254.169.254",
    "10.0.0.1",
    "0x7f000001",
    "127.1",
    "a@127.0.0.1",
]
SCHEMES = ["http", "https", "file", "ftp", "gopher", "javascript", "jar:http", ""]


def hostile(draw: random.Random, url: str) -> object:
    """What should not be sent as an image's URL."""
    whole = encoded(draw.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]), LEVELS)
    as_data = "data:image/png;base64,"
    match draw.randrange(10):
        case 0:
            return as_data + b64encode(whole[: draw.randrange(len(whole))]).decode()
        case 1:
            side = draw.choice([9_000, 20_000, 60_000, 2**31 - 1])
            return as_data + b64encode(bomb(side, draw.choice([1, side]))).decode()
        case 2:
            kept = bytearray(whole)
            kept[draw.randrange(len(kept))] ^= 1 << draw.randrange(8)
            return as_data + b64encode(kept).decode()
        case 3:
            return f"{url}/{draw.choice(['endless', 'missing', 'away', '9', 'text', 'bomb', 'half'])}"
        case 4:
            return f"{draw.choice(SCHEMES)}://{draw.choice(HOSTS)}:{draw.choice([1, 80, 70000])}/a.png"
        case 5:
            return draw.choice(
                ["/dev/zero", "/etc/passwd", "../../etc/passwd", "file:///dev/random", "", " ", "\0"]
            )
        case 6:
            return draw.choice(
                [None, 5, True, [], {}, [DATA], {"url": DATA}, DATA * 3, "data:", "data:,", "data"]
            )
        case 7:
            line = Image.new("1", draw.choice([(1, 200_000), (200_000, 1), (9, 9_000_000)]))
            return as_data + b64encode(encoded("PNG", line)).decode()
        case 8:
            return as_data + "A" * draw.choice([1, 1000, 10**6])
    return "data:" + "".join(chr(draw.randrange(1, 0x250)) for _ in range(draw.randrange(40)))


@pytest.mark.parametrize("cases", [40, pytest.param(300, marks=pytest.mark.full)])
def test_no_image_or_url_harms_the_server(cases, sees, seeing, site):
    site.files |= {"bomb": bomb(30_000, 30_000), "half": PNG[:40]}
    site.away = f"http://localhost:{site.server_address[1]}/png"
    draw = random.Random(17)

    async def send(client: httpx.AsyncClient, turns: asyncio.Semaphore) -> int:
        said = asked(
            hostile(draw, site.url), **draw.choice([{}, {"detail": "low"}, {"max_dynamic_patch": 2**30}])
        )
        body = json.dumps({"messages": said, "max_tokens": 2}).encode()
        async with turns:
            answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code < 500, (body[:300], answer.text[:300])
        return answer.status_code

    async def main() -> list[int]:
        turns = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=sees.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*(send(client, turns) for _ in range(cases)))

    def sent() -> int:
        """Sends the same again; what the process holds then, in bytes, as far as it can be told."""
        draw.seed(17)
        assert asyncio.run(main()).count(400) > cases / 2
        check_unharmed(sees, seeing)
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free counts as held otherwise
        return psutil.Process().memory_info().rss

    warm = [sent() for _ in range(2)]
    assert sent() < warm[-1] + (64 << 20)
