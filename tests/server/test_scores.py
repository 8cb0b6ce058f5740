"""Models that judge texts: their numbers are those of transformers, in Python and on every route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdeploy_jax import GenerationConfig, Pipeline, pipeline
from lmdeploy_jax.engine.io.scores import Judge
from lmdeploy_jax.errors import ContextLengthError, RequestError
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests import patience
from tests.engine.harness import config
from tests.judges import STEP, Oracle, save_classifier, save_judge, save_tokenizer
from tests.oracle import hf_logits, save_checkpoint
from tests.server.live import LiveServer, serving

TEXTS = ["w3 w77 w5 w11", "w200 w9", "w8 w8 w1 w30 w41 w17 w5"]
TWO = {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (1, 64), "score.2.bias": (1,)}
STEPS = TWO | {"score.2.weight": (2, 64), "score.2.bias": (2,)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = ["llama", "mixtral", "gemma2", "qwen3_next"]


@dataclass
class Served:
    """A model that judges, its server, and what transformers says."""

    pipe: Pipeline
    live: LiveServer
    oracle: Oracle

    def ask(self, route: str, status: int = 200, **body: Any) -> Any:
        answer = patience.post(f"{self.live.url}{route}", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def ids(self, text: str) -> list[int]:
        return self.pipe.tokenizer.encode(text)

    def last(self, text: str) -> np.ndarray:
        return self.oracle(self.ids(text))[-1]


@contextmanager
def opened(folder: Path, oracle: Oracle, cache: Path, **changes: Any) -> Iterator[Served]:
    with (
        pipeline(folder, config(cache, **changes), progress=False) as pipe,
        serving(pipe.frontend) as live,
    ):
        yield Served(pipe, live, oracle)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "architecture", "head"),
    [
        ("internlm2", "InternLM2ForRewardModel", {"v_head.weight": (1, 64)}),
        ("qwen2", "Qwen2ForRewardModel", TWO),
    ],
)
def test_rewards(name: str, architecture: str, head: Any, tmp_path: Path, cache: Path) -> None:
    oracle = save_judge(name, tmp_path, architecture, head, reward_token_id=9)
    with opened(tmp_path, oracle, cache) as served:
        want = [served.last(text)[0] for text in TEXTS]
        ids = [served.ids(text) for text in TEXTS]
        np.testing.assert_allclose(served.pipe.get_reward_score(ids), want, **CLOSE)
        np.testing.assert_allclose(served.pipe.get_reward_score(ids[0]), want[:1], **CLOSE)
        answer = served.ask("/pooling", model="", input=TEXTS)
        assert [(item["index"], item["object"]) for item in answer["data"]] == [
            (i, "pooling") for i in range(3)
        ]
        np.testing.assert_allclose([item["data"] for item in answer["data"]], want, **CLOSE)
        assert answer["object"] == "list"
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        (single,) = served.ask("/pooling", input=ids[1])["data"]
        assert single["data"] == pytest.approx(want[1], abs=1e-4)
        assert "gives scores and no text" in served.pipe("w1", do_preprocess=False).error_message
        error = served.ask("/v1/completions", 400, model="", prompt="w1")["error"]
        assert "gives scores and no text" in error["message"]
        assert "no vectors" in served.ask("/pooling", 400, input="w1", dimensions=3)["error"]["message"]
        for route in ("/v1/score", "/v1/rerank"):
            body = {"query": "w1", "queries": "w1", "documents": ["w2"]}
            assert "POST /pooling" in served.ask(route, 400, **body)["error"]["message"]
        assert "POST /pooling" in served.ask("/v1/classify", 400, input="w1")["error"]["message"]
        vector = served.ask("/v1/embeddings", input="w1")["data"][0]["embedding"]
        assert np.linalg.norm(vector) == pytest.approx(1)


def test_rewards_of_steps(tmp_path: Path, cache: Path) -> None:
    oracle = save_judge("qwen2", tmp_path, "Qwen2ForProcessRewardModel", STEPS)
    solutions = ["w1 w2 <extra_0> w3 <extra_0>", "w4 w5", " ".join(f"w{i} <extra_0>" for i in range(90))]
    with opened(tmp_path, oracle, cache) as served:
        ids = [served.ids(text) for text in solutions]
        want = [softmax(oracle(each)[np.array(each) == STEP])[:, 1] for each in ids]
        found = served.pipe.get_reward_score(ids)
        assert [len(steps) for steps in found] == [2, 0, 90]
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got, expected, **CLOSE)
        assert [item["data"] for item in served.ask("/pooling", input=solutions)["data"]] == [
            pytest.approx(steps, abs=1e-4) for steps in found
        ]


def test_a_reranker_of_one_label(tmp_path: Path, cache: Path) -> None:
    oracle = save_classifier("qwen3", tmp_path, num_labels=1)
    with opened(tmp_path, oracle, cache) as served:
        query = "w7 w12"
        want = [1 / (1 + np.exp(-served.last(f"{query} {text}")[0])) for text in TEXTS]
        order = sorted(range(3), key=lambda i: -want[i])
        documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
        for route in ("/v1/rerank", "/rerank", "/v2/rerank"):
            answer = served.ask(route, query=query, documents=documents)
            assert [item["index"] for item in answer["results"]] == order
            for item in answer["results"]:
                assert item["relevance_score"] == pytest.approx(want[item["index"]], abs=1e-4)
                assert item["document"] == {"text": TEXTS[item["index"]]}
        best = served.ask("/v1/rerank", query=query, documents=documents, top_n=1, return_documents=False)
        assert [list(item) for item in best["results"]] == [["index", "relevance_score"]]
        named = [
            {"text_1": query, "text_2": TEXTS},
            {"queries": [query], "documents": TEXTS},
            {"queries": [query] * 3, "items": TEXTS},
            {"data_1": [query] * 3, "data_2": TEXTS},
        ]
        for body in named:
            scores = [item["score"] for item in served.ask("/v1/score", **body)["data"]]
            np.testing.assert_allclose(scores, want, **CLOSE)
        error = served.ask("/v1/score", 400, text_1=["w1", "w2"], text_2=TEXTS)["error"]
        assert error["param"] == "documents"
        assert served.ask("/v1/rerank", 400, query=query, documents=[])["error"]["param"] == "documents"
        (reward,) = served.pipe.get_reward_score(served.ids(TEXTS[0]))  # as Skywork's reward models are
        assert reward == pytest.approx(served.last(TEXTS[0])[0], abs=1e-4)


def test_classes_by_name(tmp_path: Path, cache: Path) -> None:
    labels = {0: "cold", 1: "warm", 2: "hot"}
    ids = {label: i for i, label in labels.items()}
    oracle = save_classifier("llama", tmp_path, id2label=labels, label2id=ids)
    with opened(tmp_path, oracle, cache) as served:
        data = served.ask("/v1/classify", input=[*TEXTS, *TEXTS])[
            "data"
        ]  # found in the cache the second time
        for text, item in zip([*TEXTS, *TEXTS], data, strict=True):
            want = softmax(served.last(text))
            np.testing.assert_allclose(item["probs"], want, **CLOSE)
            assert (item["label"], item["num_classes"]) == (labels[int(want.argmax())], 3)
        raw = [item["data"] for item in served.ask("/pooling", input=TEXTS)["data"]]
        np.testing.assert_allclose(raw, [served.last(text) for text in TEXTS], **CLOSE)
        body = {"query": "w1", "documents": TEXTS}
        assert "3 classes" in served.ask("/v1/rerank", 400, **body)["error"]["message"]
        with pytest.raises(ValueError, match="LlamaForSequenceClassification is not in reward model list"):
            served.pipe.get_reward_score([1, 2])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.full
def test_other_families(name: str, tmp_path: Path, cache: Path) -> None:
    oracle = save_classifier(name, tmp_path, num_labels=2)
    with opened(tmp_path, oracle, cache) as served:
        raw = [item["data"] for item in served.ask("/pooling", input=TEXTS)["data"]]
        np.testing.assert_allclose(raw, [served.last(text) for text in TEXTS], **CLOSE)


def test_a_language_model_that_says_yes_or_no(tmp_path: Path, cache: Path) -> None:
    save_checkpoint("qwen3", tmp_path)
    save_tokenizer(tmp_path)
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    with opened(tmp_path, None, cache, hf_overrides=overrides) as served:
        judge = served.pipe.frontend.judge
        want = []
        for text in TEXTS:
            prompt = judge.pair("w7", text, "w5")
            words = [served.pipe.tokenizer.token_text(token) for token in prompt]
            assert {"w5", "w7", *text.split()} <= set(words)
            want.append(softmax(hf_logits(tmp_path, prompt)[-1, [250, 251]])[1])
        body = {"query": "w7", "documents": TEXTS, "instruction": "w5"}
        for item in served.ask("/v1/rerank", **body)["results"]:
            assert item["relevance_score"] == pytest.approx(want[item["index"]], abs=1e-4)
        assert len(served.pipe("w1", GenerationConfig(max_new_tokens=3), do_preprocess=False).token_ids) == 3
        (item,) = served.ask("/v1/classify", input="w1 w2")["data"]
        assert item["label"] in ("no", "yes")


def test_a_head_is_told_by_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    from lmdeploy_jax.models.score_config import ScoreConfig

    save_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(RequestError, match="'w1 w2' is 2 tokens"):
        Judge(ScoreConfig(("no", "w1 w2"), words=True), tokenizer, 64)
    for own in (False, True):  # megabytes of text are not tokenised to be told that they are too many
        judge = Judge(ScoreConfig(("w1",), qwen3_prompt=own), tokenizer, 64)
        assert len(judge.pair("w1", "w2", None)) >= 2
        with pytest.raises(ContextLengthError, match="more than 64 tokens"):
            judge.pair("w1", "w2 " * 100_000, None)


def test_a_model_without_a_head_says_so(live: LiveServer, pipe: Pipeline) -> None:
    body = {"query": "a", "queries": "a", "documents": ["b"], "input": "a"}
    for route in ("/v1/rerank", "/v1/score", "/v1/classify"):
        answer = patience.post(f"{live.url}{route}", json=body)
        assert answer.status_code == 400
        assert "no head that judges texts" in answer.json()["error"]["message"]
