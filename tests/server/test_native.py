"""LMDeploy's own routes."""

from __future__ import annotations

import json

import httpx
import pytest

from lmdeploy_jax import GenerationConfig
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def http(live):
    with httpx.Client(base_url=live.url, timeout=PATIENCE) as http:
        yield http


def events(response):
    """The data of a stream of events."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_generate(http, pipe):
    wanted = pipe.infer("one two", GenerationConfig(max_new_tokens=8, logprobs=0), do_preprocess=False)
    body = {"prompt": "one two", "max_tokens": 8, "return_logprob": True}
    whole = http.post("/generate", json=body).json()
    assert (whole["text"], whole["output_ids"]) == (wanted.text, wanted.token_ids)
    meta = whole["meta_info"]
    assert meta["finish_reason"]["type"] == wanted.finish_reason
    assert [i for _, i in meta["output_token_logprobs"]] == wanted.token_ids
    pieces = events(http.post("/generate", json=body | {"stream": True}))
    assert "".join(p["text"] for p in pieces) == wanted.text
    assert [i for p in pieces for i in p["output_ids"]] == wanted.token_ids
    ids = pipe.tokenizer.encode("one two")
    assert http.post("/generate", json={"input_ids": ids, "max_tokens": 8}).json()["text"] == wanted.text
    stopped = http.post("/generate", json={"prompt": "one two", "stop": wanted.text[3:6]}).json()
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": wanted.text[3:6]}


def test_texts_to_tokens_and_back(http, pipe):
    tokenizer = pipe.tokenizer
    ids = tokenizer.encode("hello wörld")
    assert http.post("/v1/encode", json={"input": "hello wörld"}).json() == {
        "input_ids": ids,
        "length": len(ids),
    }
    lists = http.post("/v1/encode", json={"input": ["a", "b c"]}).json()
    assert lists["input_ids"] == [tokenizer.encode("a"), tokenizer.encode("b c")]
    told = http.post("/tokenize", json={"prompt": "hello wörld", "return_token_strs": True}).json()
    assert (told["tokens"], told["count"]) == (ids, len(ids))
    assert "".join(told["token_strs"]).startswith("hello w")
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "hello wörld"}
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat == http.post("/v1/encode", json={"input": "hi", "do_preprocess": True}).json()["input_ids"]


def test_perplexity(http, pipe):
    ids = pipe.tokenizer.encode("The cat sat on the mat.")
    (wanted,) = pipe.get_ppl(ids)
    for given in (ids, "The cat sat on the mat."):
        assert http.post("/get_ppl", json={"input": given}).json()["ppl"] == pytest.approx(wanted, abs=1e-4)
    for given in ("", [], [5]):
        assert http.post("/get_ppl", json={"input": given}).status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {}),
        ("/generate", {"prompt": "a", "input_ids": [5]}),
        ("/generate", {"prompt": "a", "image_data": "x"}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [-1]}),
        ("/v1/encode", {"input": 5}),
        ("/get_ppl", {"input": "word " * 2000}),
    ],
)
def test_what_makes_no_sense_is_refused(http, path, body):
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_version_and_metrics(http, pipe):
    from lmdeploy_jax import __version__

    assert http.get("/version").json() == {"version": __version__}
    before = http.get("/metrics").text
    http.post("/generate", json={"prompt": "one two", "max_tokens": 5, "ignore_eos": True})
    after = http.get("/metrics").text
    for name, gain in (("generation_tokens_total", 5), ("request_queue_time_seconds_count", 1)):
        assert value(after, name) - value(before, name) == gain
    assert value(after, "iteration_tokens_total_sum") > 0
    assert 0 <= value(after, "gpu_cache_usage_perc") < 1
    assert "lmdeploy_jax:compilations" in after


def value(text, name):
    """The first value of a metric."""
    return float(
        next(line for line in text.splitlines() if line.startswith(f"lmdeploy_jax:{name}{{")).split()[-1]
    )
