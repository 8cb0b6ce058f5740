"""Embeddings through OpenAI's client, against the hidden states of transformers."""

from __future__ import annotations

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import patience

MODEL = "tiny-chat"
TEXTS = ["The capital of France is Paris.", "one two three", "Bye.<|im_end|>"]  # after the last comes an end


@pytest.fixture(scope="module")
def hidden(pipe):
    """Text -> the last layer's hidden states of transformers, [tokens, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(pipe.frontend.engine.folder, dtype=torch.float32)

    def states(text):
        ids = torch.tensor([pipe.frontend.tokenizer.encode(text)])
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[-1][0].numpy()

    return states


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_last_token_of_every_input(client, hidden, encoding):
    # The client asks for base64 by itself where no format is given, and decodes it.
    format = {"encoding_format": "float"} if encoding == "float" else {}
    answer = client.embeddings.create(model=MODEL, input=TEXTS, **format)
    assert [item.index for item in answer.data] == [0, 1, 2]
    for text, item in zip(TEXTS, answer.data, strict=True):
        np.testing.assert_allclose(item.embedding, unit(hidden(text)[-1]), atol=1e-4)
    assert answer.usage.prompt_tokens == sum(len(hidden(text)) for text in TEXTS)


def test_the_mean_and_fewer_dimensions(client, hidden):
    answer = client.embeddings.create(
        model=MODEL, input=TEXTS[0], dimensions=16, extra_body={"pooling": "mean"}
    )
    np.testing.assert_allclose(answer.data[0].embedding, unit(hidden(TEXTS[0]).mean(0)[:16]), atol=1e-4)


def test_tokens_and_a_repeated_input(client, pipe, hidden):
    ids = pipe.frontend.tokenizer.encode(TEXTS[0])
    for input in (ids, [ids, ids], [TEXTS[0]]):  # later ones find the prompt in the prefix cache
        for item in client.embeddings.create(model=MODEL, input=input).data:
            np.testing.assert_allclose(item.embedding, unit(hidden(TEXTS[0])[-1]), atol=1e-4)


def test_pooling_is_not_normalised(live, hidden):
    answer = patience.post(f"{live.url}/pooling", json={"input": TEXTS[0]}).json()
    assert (answer["object"], answer["data"][0]["object"]) == ("list", "pooling")
    np.testing.assert_allclose(answer["data"][0]["data"], hidden(TEXTS[0])[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fields", [{"input": []}, {"input": ""}, {"input": "a", "dimensions": 10**6}, {"input": [[1], []]}]
)
def test_what_is_refused(client, fields):
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(**{"model": MODEL} | fields)
