"""What the files beside tokenizer.json say of its tokens; transformers on the same folder is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer

from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.engine.io.params import ModelLimits, stops
from lmdeploy_jax.errors import CheckpointError
from lmdeploy_jax.messages import GenerationConfig
from lmdeploy_jax.text.chat_template import select
from lmdeploy_jax.text.detokenize import DetokenizeState
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.fake_engine import FakeEngine
from tests.text.conftest import CORPUS

ORDINARY, SPECIAL = ("<A>", "<B>", "<C>"), "<S>"


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """tokenizer.json calls three added tokens ordinary and one special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ORDINARY])
    made.add_special_tokens([tokenizers.AddedToken(SPECIAL, normalized=False)])
    return made


@pytest.fixture
def folder(backend, tmp_path: Path):
    """Makes a checkpoint's folder of the tokenizer and files beside it."""

    def make(config: dict, /, **files: dict) -> Path:
        backend.save(str(tmp_path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        for name, content in {"tokenizer_config": settings, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def entry(content: str, special: bool, **flags: bool) -> dict:
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return plain | {"content": content, "special": special} | flags


def table(backend, content: str, special: bool, **flags: bool) -> dict:
    return {"added_tokens_decoder": {str(backend.token_to_id(content)): entry(content, special, **flags)}}


FILES = {
    "nothing": lambda b: {},
    "special in the table": lambda b: table(b, "<A>", True),
    "not special in the table": lambda b: table(b, SPECIAL, False),
    "space of another side in the table": lambda b: table(b, "<A>", True, rstrip=True),
    "named, and not special in the table": lambda b: (
        {"eos_token": "<B>"} | table(b, "<B>", False, lstrip=True)
    ),
    "end": lambda b: {"eos_token": "<B>"},
    "padding as an object": lambda b: {"pad_token": entry("<C>", True) | {"__type": "AddedToken"}},
    "additional": lambda b: {"additional_special_tokens": ["<A>", "<new>"]},
    "extra": lambda b: {"extra_special_tokens": ["<A>", "<new>"]},
    "extra with names": lambda b: {"extra_special_tokens": {"image_token": "<A>", "x": "<new>"}},
    "a name of its own": lambda b: {"image_token": "<A>"},
    "the model's own": lambda b: {"model_specific_special_tokens": {"image_token": "<C>"}},
}


@pytest.mark.parametrize("name", FILES)
def test_ids_and_visible_text_equal_transformers(name, backend, folder):
    path = folder(FILES[name](backend))
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in ("Hello<A><B><C><S><new> world", "x <A>  y  <B> z <C> ", "<new><S>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_special_flags_of_special_tokens_map(folder):
    path = folder({}, special_tokens_map={"eos_token": "<B>"})
    assert Tokenizer(path).decode(AutoTokenizer.from_pretrained(path).encode("a<B>b")) == "ab"


def test_a_stop_word_that_is_special_by_the_files_stops_by_its_id(backend, folder):
    tokenizer = Tokenizer(folder(table(backend, "<A>", True)))
    limits = ModelLimits(
        session_len=100,
        vocab_size=len(tokenizer),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        is_special=tokenizer.is_special,
    )
    found = stops(GenerationConfig(stop_words=["<A>", "<B>"]), limits)
    assert (found.ids, found.strings) == ({backend.token_to_id("<A>")}, ("<B>",))


def test_named_tokens_are_variables_of_the_template(folder):
    source = "{{image_token}}|{{eos_token}}|{{video_token}}|{{bos_token}}"
    config = {"eos_token": "<B>", "extra_special_tokens": {"image_token": "<A>"}, "video_token": "<C>"}
    path = folder(config | {"chat_template": source})
    talk = [{"role": "user", "content": "hi"}]
    text = AutoTokenizer.from_pretrained(path).apply_chat_template(talk, tokenize=False)
    assert text == "<A>|<B>|<C>|"
    assert select(Tokenizer(path), path).render(talk) == text


def test_the_processors_template_is_the_last_resort(folder):
    path = folder({"chat_template": "tokenizer's"}, chat_template={"chat_template": "processor's"})
    theirs = AutoTokenizer.from_pretrained(path)
    assert select(Tokenizer(path), path).render([{"role": "user", "content": ""}]) == theirs.chat_template
    path = folder({}, chat_template={"chat_template": "processor's"})
    assert select(Tokenizer(path), path).render([{"role": "user", "content": ""}]) == "processor's"


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("ids", [[2, None], [[2]], "two", True, [1.5], {"a": 1}])
def test_malformed_end_ids_are_told(name, ids, folder):
    with pytest.raises(CheckpointError, match=rf"/{name}\.json: eos_token_id is "):
        Tokenizer(folder({}, **{name: {"eos_token_id": ids}}))


@pytest.mark.parametrize(("ids", "known"), [(7, (7,)), ([7, 8], (7, 8)), ([], ()), (None, ())])
def test_end_ids_in_every_spelling(ids, known, folder):
    path = folder({}, generation_config={"eos_token_id": ids})
    assert Tokenizer(path).eos_token_ids == known


def test_end_ids_beyond_the_model_are_dropped_with_a_line(folder, caplog):
    path = folder({}, generation_config={"eos_token_id": [7, 9999, -1]})
    tokenizer = Tokenizer(path)
    engine = FakeEngine(path, lambda request, index: [], vocab_size=400)
    with caplog.at_level("WARNING", "lmdeploy_jax"):
        frontend = Frontend(engine, tokenizer, select(tokenizer, path))
    frontend.close()
    assert frontend.limits.eos_ids == {7}
    assert "eos_token_id beyond the model's 400 tokens end nothing: [9999, -1]" in caplog.text


@pytest.mark.parametrize("wanted", [None, True, False])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_space_before_the_text_of_a_byte_level_tokenizer(kind, wanted, folder):
    given = {} if wanted is None else {"add_prefix_space": wanted}
    check_prefix(folder({"tokenizer_class": kind} | given))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_no_space_before_the_text_of_a_metaspace_tokenizer(kind, metaspace, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((metaspace / "tokenizer.json").read_bytes())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    check_prefix(tmp_path)


def check_prefix(path: Path) -> None:
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in ("Hello world", " Hello", "a  b"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_are_those_of_transformers(spaces, folder):
    path = folder({"eos_token": "<A>", "pad_token": "<B>"})
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    ids = theirs.encode("x<A><B><S> y<A>")
    text, _ = ours.detokenize_incrementally(ids, DetokenizeState(), False, spaces)
    assert text == theirs.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)


def test_a_named_token_of_a_sentencepiece_model_is_special(sp_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((sp_model / "tokenizer.model").read_bytes())
    added = {"500": entry("<end>", False), "501": entry("<a>", True), "502": entry("<b>", False)}
    config = {"bos_token": "<s>", "eos_token": "<end>", "legacy": False, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("Hello<a> <b>x<end>", add_special_tokens=False)
    assert ids == theirs.encode("Hello<a> <b>x<end>", add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.is_special(500)
