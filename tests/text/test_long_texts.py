"""Texts of any length: same ids, the interpreter free meanwhile, and nothing spent on what cannot fit."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from lmdeploy_jax.text import added_tokens
from lmdeploy_jax.text.added_tokens import AddedTokenCutter
from lmdeploy_jax.text.settings import AddedToken
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.text.conftest import CORPUS

KINDS = ("byte_level", "metaspace", "wordpiece", "internlm2", "swallowing")


@pytest.fixture(scope="session")
def swallowing(byte_level: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a token that takes all white space beside it."""
    folder = tmp_path_factory.mktemp("swallowing")
    theirs = PreTrainedTokenizerFast.from_pretrained(byte_level)
    theirs.add_tokens([tokenizers.AddedToken("<gap>", lstrip=True, rstrip=True)])
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def ours(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_long_texts_have_the_ids_of_transformers(kind, request):
    folder = request.getfixturevalue(kind)
    text = "\n".join(CORPUS) * 3
    assert Tokenizer(folder).encode(text) == PreTrainedTokenizerFast.from_pretrained(folder).encode(text)


TEXTS = {
    "prose": " ".join(CORPUS),
    "one word": "a" * 5000,
    "long words": ("b" * 150 + " ") * 30,
    "white space": " \n\t" * 2000,
    "swallowed space": "<gap>" + " " * 70_000,
    "strange characters": "𓀀𓁐" * 2000,
    "digits": "1234567890" * 500,
    "control tokens": "<|im_start|>" * 500,
}


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_that_fits_is_refused(ours, name):
    for times in (1, 3):
        text = TEXTS[name] * times
        length = len(ours.encode(text))
        for most in (1, length // 2, length, length + 1, 2 * length):
            assert not ours.exceeds(text, most) or length > most


class Counting:
    """A backend that counts the characters it is given."""

    def __init__(self, backend):
        self._backend, self.given = backend, 0

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def encode(self, text, add_special_tokens):
        self.given += len(text)
        return self._backend.encode(text, add_special_tokens)


@pytest.mark.parametrize("name", ["prose", "long words"])
def test_what_cannot_fit_is_hardly_read(ours, name):
    text = TEXTS[name] * (6_000_000 // len(TEXTS[name]))
    backend = ours._backend = Counting(ours._backend)
    assert ours.exceeds(text, 100)
    assert backend.given < len(text) / 5


@pytest.mark.parametrize("kind", ["byte_level", "internlm2"])
def test_other_threads_run_while_a_text_is_tokenised(kind, request):
    ours, ticks, done = Tokenizer(request.getfixturevalue(kind)), [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    text = " ".join(CORPUS) * 150
    begun = time.perf_counter()
    ours.encode(text)
    ended = time.perf_counter()
    done.set()
    thread.join()
    assert sum(begun < t < ended for t in ticks) > 3


def test_a_fork_after_long_texts_says_nothing_and_works(byte_level):
    script = f"""
import os
from lmdeploy_jax.text.tokenizer import Tokenizer
tokenizer = Tokenizer({str(byte_level)!r})
ids = tokenizer.encode("hello " * 10000)
child = os.fork()
if not child:
    os._exit(ids != tokenizer.encode("hello " * 10000))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")


TOKENS = [
    AddedToken("<l>", lstrip=True),
    AddedToken("<r>", rstrip=True),
    AddedToken("<lr>", lstrip=True, rstrip=True),
    AddedToken("<w>", single_word=True),
    AddedToken("<a>"),
    AddedToken("<a>b"),
    AddedToken("\n\n"),
]


@pytest.mark.parametrize("window", [3, 1 << 16])
def test_added_tokens_are_cut_out_as_by_the_tokenizers_library(window, monkeypatch):
    monkeypatch.setattr(added_tokens, "_WINDOW", window)
    oracle = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    oracle.add_special_tokens([
        tokenizers.AddedToken(
            t.content, lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word, normalized=False
        )
        for t in TOKENS
    ])  # fmt: skip
    cutter, rnd = AddedTokenCutter(dict(enumerate(TOKENS, 1))), random.Random(3)
    for _ in range(300):
        pieces = [t.content for t in TOKENS if t.content != "\n\n"] + [" ", "  ", "x", "é", "<", "<a", "\t"]
        text = "".join(rnd.choices(pieces, k=12))
        found = oracle.encode(text)
        rows = zip(found.offsets, found.ids, strict=True)
        assert list(cutter.find(text)) == [(*span, i) for span, i in rows if i], text
