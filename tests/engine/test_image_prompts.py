"""Every form in which a prompt holds images, and LMDeploy's names for them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmdeploy_jax import GenerationConfig, Pipeline, VisionConfig, pipeline
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.vl import IMAGE_TOKEN, encode_image_base64, load_image
from lmdeploy_jax.vl.constants import IMAGE_TOKEN as LMDEPLOYS
from tests.engine.harness import config
from tests.engine.test_images import ASK, ONE, encoded, save
from tests.vision.pictures import picture

OTHER = picture(90, 30)
SHORT = GenerationConfig(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> Iterator[Pipeline]:
    folder = save("internvl_hf", tmp_path_factory.mktemp("prompts"))
    options = {"vision_config": VisionConfig(max_batch_size=2), "allowed_media_domains": ["A.example"]}
    with pipeline(folder, config(compile_cache), progress=False, **options) as pipe:
        assert pipe.frontend.engine.config.vision_max_batch_size == 2
        yield pipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "one.png"
    ONE.save(path)
    return path


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def part(source: Any, kind: str = "image_url", **options: object) -> dict[str, Any]:
    return {"type": kind, kind: {"url": source, **options}}


def test_every_form_is_the_same_prompt(pipe: Pipeline, path: Path) -> None:
    url = "data:image/png;base64," + encode_image_base64(path)
    text = {"type": "text", "text": ASK}
    forms = [
        (ASK, ONE),
        (ASK, [ONE]),
        (ASK, path),
        (ASK, np.asarray(ONE)),
        (ASK, url),
        (ASK + IMAGE_TOKEN, ONE),
        (ONE, ASK + IMAGE_TOKEN),
        user(text, part(url)),
        user(text, part(str(path))),
        user(text, part(path.as_uri())),
        user(text, {"type": "image_url", "image_url": url}),
        user(text, {"type": "image", "image": ONE}),
        user(text, {"type": "image_data", "image_data": {"data": ONE}}),
        user(text, {"type": "image_data", "image_data": ONE, "detail": "auto"}),
        user(part(url), {"type": "text", "text": ASK + IMAGE_TOKEN}),
    ]
    (expected,) = {tuple(encoded(pipe, form)) for form in forms}
    assert len(expected) > len(encoded(pipe, ASK)) + 4
    first = encoded(pipe, (ONE, ASK))
    assert first != list(expected)
    assert sorted(first) == sorted(expected)
    assert first == encoded(pipe, (ONE, IMAGE_TOKEN + ASK))
    assert encoded(pipe, (ASK, [])) == encoded(pipe, ASK)


def test_several_images_stand_where_the_text_says(pipe: Pipeline) -> None:
    marked = f"w1 {IMAGE_TOKEN} w2 {IMAGE_TOKEN} w3"
    apart = user("w1 ", {"type": "image", "image": ONE}, " w2 ", {"type": "image", "image": OTHER}, " w3")
    assert encoded(pipe, (marked, [ONE, OTHER])) == encoded(pipe, apart)
    assert encoded(pipe, (marked, [OTHER, ONE])) != encoded(pipe, apart)
    for prompt, told in (((marked, ONE), "2 vs 1"), ((ASK + IMAGE_TOKEN, [ONE, OTHER]), "1 vs 2")):
        answer = pipe(prompt, SHORT)
        assert f"the number of {IMAGE_TOKEN} is not equal to input images, {told}" in answer.error_message


def test_options_are_an_images_own(pipe: Pipeline) -> None:
    image = Image.new("RGB", (300, 100))

    def count(*parts: dict[str, Any]) -> int:
        return len(encoded(pipe, user(*parts)))

    one, many = (part(image, max_dynamic_patch=most) for most in (1, 6))
    least, most = count(one), count(many)
    assert most > least
    assert count(one, many) == least + most - len(encoded(pipe, user("")))
    for given, expected in ((part(image), least), (part(image, max_dynamic_patch=6), most)):
        answer = pipe(user(given), SHORT, mm_processor_kwargs={"image": {"max_dynamic_patch": 1}})
        assert answer.input_token_len == expected
    for wrong in ({"audio": {}}, {"image": 5}, {"image": {}, "min_pixels": 4}, ["image"]):
        with pytest.raises(RequestError, match="mm_processor_kwargs"):
            pipe(user(part(image)), SHORT, mm_processor_kwargs=wrong)
    (answer,) = pipe([user(part(image, max_pixels=9))], SHORT)
    assert "image option max_pixels is unknown to this model; known: detail, max_" in answer.error_message


def test_a_batch_of_all_forms(pipe: Pipeline) -> None:
    prompts = [(ASK, ONE), ASK, user(part(OTHER)), (ASK, "/no/such.png"), [5, 6]]
    prompts[3] = (ASK, Path("/no/such.png"))
    answers = pipe(prompts, SHORT)
    assert [answer.finish_reason for answer in answers] == ["length", "length", "length", "error", "length"]
    for i in (0, 2):
        assert answers[i].token_ids == pipe(prompts[i], SHORT).token_ids


def test_a_conversation_remembers_its_images(pipe: Pipeline) -> None:
    session = pipe.chat((ASK, ONE), gen_config=SHORT)
    first = session.response.text
    pipe.chat("w8", session, SHORT)
    said = [*user(ASK, {"type": "image", "image": ONE}), {"role": "assistant", "content": first}]
    assert session.response.token_ids == pipe([*said, *user("w8")], SHORT).token_ids
    assert session.response.input_token_len == len(encoded(pipe, [*said, *user("w8")]))
    pieces = list(pipe.chat((ASK, [OTHER]), session, SHORT, stream_response=True))
    assert pieces[-1].finish_reason == "length"
    assert [len(turn) for turn, _ in session.history] == [2, 2, 2]
    with pytest.raises(ValueError, match="A turn is"):
        pipe.chat((ASK, 5), session)


def test_hosts_that_a_program_may_name(pipe: Pipeline) -> None:
    answer = pipe((ASK, "http://b.example/c.png"), SHORT)
    assert "the host 'b.example' is not among those that are allowed (a.example)" in answer.error_message


def test_lmdeploys_names(path: Path) -> None:
    assert IMAGE_TOKEN == LMDEPLOYS == "<IMAGE_TOKEN>"
    text = encode_image_base64(ONE)
    assert base64.b64decode(text).startswith(b"\x89PNG")
    for source in (path, str(path), path.as_uri(), f"data:image/png;base64,{text}", np.asarray(ONE), ONE):
        assert load_image(source).tobytes() == ONE.tobytes()
    assert base64.b64decode(encode_image_base64(path, "JPEG")).startswith(b"\xff\xd8")
    with pytest.raises(RequestError, match="format='no'"):
        encode_image_base64(ONE, "no")
