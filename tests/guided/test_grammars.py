"""Response formats, followed at random and refused by name; `re`, `json` and `jsonschema` are the oracles."""

from __future__ import annotations

import json
import random
import re
import threading

import jsonschema
import numpy as np
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.guided import Grammars, after_reasoning
from lmdeploy_jax.guided import matcher as matcher_module
from lmdeploy_jax.guided.matcher import fill_masks
from lmdeploy_jax.sampling.mask import mask_words
from lmdeploy_jax.text.parsers import reasoning_format
from lmdeploy_jax.text.tokenizer import Tokenizer
from tests.guided.walks import allowed, text_of, walk

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$", "maxLength": 6},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"anyOf": [{"type": "boolean"}, {"const": 1.5}]},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
}
VOCAB = 2570  # ten more than the tokenizer has


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY_CHAT)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


def schema_format(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def texts(grammars: Grammars, tokenizer: Tokenizer, form: dict, count: int = 20) -> list[str]:
    grammar = grammars.compile(form)
    walks = (walk(grammar, tokenizer, VOCAB, random.Random(seed)) for seed in range(count))
    return [text_of(ids, tokenizer) for ids in walks]


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "array", "items": PERSON, "maxItems": 2}])
def test_json_fits_its_schema(schema, grammars, tokenizer):
    for text in texts(grammars, tokenizer, schema_format(schema)):
        jsonschema.validate(json.loads(text), schema)


def test_json_object(grammars, tokenizer):
    assert all(
        isinstance(json.loads(text), dict) for text in texts(grammars, tokenizer, {"type": "json_object"})
    )


@pytest.mark.parametrize("kind", ["regex_schema", "regex"])
def test_the_whole_answer_matches_the_expression(kind, grammars, tokenizer):
    pattern = r"^(ab|ü)/[0-9]{2,4}\n(x|yz)?"
    found = texts(grammars, tokenizer, {"type": kind, kind: pattern})
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(set(found)) > 10


def test_choice(grammars, tokenizer):
    choices = ["yes", 'no "never"', "ja/nein\n", "🎈", "yes, sir", "<|im_end|>yes"]  # the name, not the token
    assert set(texts(grammars, tokenizer, {"type": "choice", "choice": choices}, 60)) == set(choices)


@pytest.mark.parametrize(
    "grammar", ['start: "a" B\nB: /[0-9]{1,9}/', 'root ::= "a" b\nb ::= [0-9] | [0-9] b']
)
def test_lark_and_gbnf(grammar, grammars, tokenizer):
    for text in texts(grammars, tokenizer, {"type": "grammar", "grammar": grammar}):
        assert re.fullmatch("a[0-9]+", text)


@pytest.mark.parametrize(
    "form",
    [
        schema_format(PERSON),
        {"type": "choice", "choice": ["yes", "no"]},
        {"type": "grammar", "grammar": 'start: "yes" | inner\ninner: "no"'},
    ],
)
@pytest.mark.parametrize("started", [True, False])
def test_what_follows_the_reasoning_keeps_its_form(form, started, grammars, tokenizer):
    wrapped = after_reasoning(form, tokenizer, reasoning_format("default"), started)
    found = texts(grammars, tokenizer, wrapped)
    for text in found:
        thinks = started or text.startswith("<think>")
        answer = text.partition("</think>")[2] if thinks else text
        if form["type"] == "json_schema":
            jsonschema.validate(json.loads(answer), PERSON)
        else:
            assert answer.strip(" \n") in ("yes", "no")
    assert any("</think>" in text for text in found)
    assert started or not all("</think>" in text for text in found)
    assert after_reasoning(None, tokenizer, reasoning_format("default")) is None


def test_a_schema_may_ask_for_what_can_be_enforced(grammars, tokenizer, caplog):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 3}
    with pytest.raises(RequestError, match="uniqueItems"):
        grammars.compile(schema_format(schema))
    lenient = schema_format(schema | {"x-guidance": {"lenient": True}})
    assert all({*json.loads(text)} <= {1, 2} for text in texts(grammars, tokenizer, lenient))
    assert "uniqueItems" in caplog.text


def test_text_needs_no_grammar(grammars):
    assert grammars.compile(None) is None
    assert grammars.compile({"type": "text"}) is None


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "xml"}, "type='xml' is unknown; choose one of text, json_object, json_schema"),
        ({"type": "json_schema"}, "json_schema=None is invalid"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "schema=None is invalid: it must be an object",
        ),
        (
            schema_format({"items": {"type": "objectt"}}),
            r"schema.items.type='objectt' is invalid: choose from",
        ),
        (schema_format({"type": "string", "not": {}}), "Unimplemented keys.*not.*x-guidance"),
        (schema_format({"type": "array", "minItems": 3, "maxItems": 2}), "minItems"),
        (schema_format({"enum": [object()]}), "not JSON"),
        (schema_format({"$ref": "#/$defs/missing"}), "missing"),
        ({"type": "regex_schema", "regex_schema": "a(b"}, "unclosed group"),
        ({"type": "regex", "regex": "a(?=b)"}, "look-around"),
        ({"type": "regex_schema", "regex": "a"}, "regex_schema=None is invalid"),
        ({"type": "choice", "choice": []}, "a list of texts, none of them empty"),
        ({"type": "choice", "choice": "yes"}, "a list of texts"),
        ({"type": "grammar", "grammar": "start: unknown"}, "unknown"),
        ({"type": "grammar", "grammar": "root ::= ("}, "cannot be read"),
        ({"type": "grammar", "grammar": "{}"}, "grammars"),
    ],
)
def test_a_faulty_format_is_refused_and_the_fault_named(form, message, grammars):
    with pytest.raises(RequestError, match=message):
        grammars.compile(form)


def test_equal_formats_share_a_grammar(grammars):
    assert grammars.compile(schema_format(PERSON)) is grammars.compile(schema_format(dict(PERSON)))


def test_the_end_comes_only_where_the_grammar_may_end(grammars, tokenizer):
    grammar = grammars.compile({"type": "regex", "regex": "a{2,3}"})
    a, end, other = tokenizer.token_to_id("a"), tokenizer.eos_token_id, tokenizer.token_to_id("!")
    matcher, endless = grammar.matcher([end, other]), grammar.matcher([])
    seen = []
    for _ in range(2):
        seen.append({end, other} & set(allowed(matcher, VOCAB)))
        assert end not in allowed(endless, VOCAB)
        matcher.advance(a)
        endless.advance(a)
    assert seen == [set(), set()]
    assert {end, other} < set(allowed(matcher, VOCAB))
    assert allowed(endless, VOCAB) == [a]
    endless.advance(a)
    assert endless.complete
    assert not matcher.complete


def test_a_token_that_does_not_fit_is_an_error(grammars, tokenizer):
    matcher = grammars.compile({"type": "choice", "choice": ["yes"]}).matcher([])
    with pytest.raises(RequestError, match="is not in the answer's grammar"):
        matcher.advance(tokenizer.token_to_id("!"))
    assert matcher.failure is not None


def test_many_masks_are_computed_alike(grammars, tokenizer, monkeypatch):
    """Row by row and in threads; rows that nobody asked for stay as they are."""
    grammar = grammars.compile(schema_format(PERSON))
    masks = []
    for threads in (1, 3):
        monkeypatch.setattr("lmdeploy_jax.guided.matcher.THREADS", threads)
        mask = np.full((9, mask_words(VOCAB)), -1, np.int32)
        fill_masks(mask, [(row, grammar.matcher([])) for row in range(8)])
        masks.append(mask)
    assert np.array_equal(*masks)
    assert (masks[0][8] == -1).all()
    assert not (masks[0][:8] == -1).all()


class PanicException(BaseException):
    """Named as pyo3's, which nobody can raise on purpose."""


@pytest.mark.parametrize("fault", [PanicException("assertion failed"), ValueError("assertion failed")])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_fault_in_a_mask_is_the_failure_of_its_sequence(threads, fault, grammars, monkeypatch):
    def panic(*args: object) -> None:
        raise fault

    def fill(matcher: object, mask: np.ndarray, row: int) -> None:
        panic() if row == 3 else fill_one(matcher, mask, row)

    fill_one = matcher_module.fill_next_token_bitmask
    monkeypatch.setattr(matcher_module, "THREADS", threads)
    monkeypatch.setattr(matcher_module, "fill_next_token_bitmask", fill)
    monkeypatch.setattr(matcher_module, "fill_next_token_bitmask_par", panic)
    grammar = grammars.compile({"type": "choice", "choice": ["yes"]})
    matchers = [grammar.matcher([]) for _ in range(6)]
    mask = np.full((6, mask_words(VOCAB)), -1, np.int32)
    fill_masks(mask, list(enumerate(matchers)))
    assert [matcher.failure is not None for matcher in matchers] == [row == 3 for row in range(6)]
    assert "assertion failed" in str(matchers[3].failure)
    assert all(np.array_equal(mask[row], mask[0]) for row in (1, 2, 4, 5))


def test_a_panic_at_a_token_is_an_error(grammars):
    matcher = grammars.compile({"type": "choice", "choice": ["yes"]}).matcher([])

    class Panicking:
        def consume_token(self, token: int) -> bool:
            raise PanicException("assertion failed")

    matcher._matcher = Panicking()
    with pytest.raises(RequestError, match="assertion failed"):
        matcher.advance(5)


def test_any_thread_may_compile(grammars):
    found: list[object] = []
    form = {"type": "regex", "regex": "thread[0-9]"}
    threads = [threading.Thread(target=lambda: found.append(grammars.compile(form))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
