"""Which chat template a model gets, and the JSON form of a template."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_jax.errors import ConfigError
from lmdeploy_jax.text import Tokenizer
from lmdeploy_jax.text.chat_template import (
    BuiltinTemplate,
    ChatTemplateConfig,
    HfChatTemplate,
    builtin,
    select,
)
from tests.text.samples import USER


def test_config_as_json(tmp_path: Path) -> None:
    config = ChatTemplateConfig("mine", user="<U>", stop_words=["</A>"], eoh="今天\n")
    assert ChatTemplateConfig.from_json(config.to_json()) == config
    config.to_json(tmp_path / "t.json")
    assert ChatTemplateConfig.from_json(tmp_path / "t.json") == config
    assert builtin_of(tmp_path / "t.json").render([USER]) == f"<U>{USER['content']}今天\n"
    for bad, words in (
        ('{"model_name": "x", "usr": "y"}', "usr"), ('{"user": "y"}', "model_name"), ("{", "not valid JSON"),
        ('{"model_name": "x", "capability": "python"}', "python"), ("no.json", "no chat template file"),
        ('{"model_name": "x", "stop_words": "y"}', "stop_words"), ('{"model_name": "x", "user": 3}', "user"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            ChatTemplateConfig.from_json(bad)


def builtin_of(path: Path) -> BuiltinTemplate:
    template = select(None, "nowhere", str(path))  # type: ignore[arg-type]
    assert isinstance(template, BuiltinTemplate)
    return template


def checkpoint(byte_level: Path, folder: Path, **files: Any) -> tuple[Tokenizer, Path]:
    """A copy of the tokenizer, with files beside it (`config` is config.json)."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    merged = {"eos_token": "<|im_end|>"} | files.pop("tokenizer_config", {})
    (folder / "tokenizer_config.json").write_text(json.dumps(merged))
    for name, content in files.items():
        path = folder / (name.replace("_jinja", ".jinja") if name.endswith("_jinja") else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer(folder), folder


def test_the_checkpoints_own_jinja_wherever_it_stands(byte_level: Path, tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "in list {{ eos_token }}"},
        {"name": "tool_use", "template": "tools"},
    ]
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "text": (
            {"tokenizer_config": {"chat_template": "in config {{ eos_token }}"}},
            "in config <|im_end|>",
        ),
        "list": ({"tokenizer_config": {"chat_template": named}}, "in list <|im_end|>"),
        "json": ({"chat_template": {"chat_template": "in json"}}, "in json"),
        "file": (
            {"chat_template_jinja": "in file", "tokenizer_config": {"chat_template": "in config"}},
            "in file",
        ),
    }
    for name, (files, expected) in cases.items():
        template = select(*checkpoint(byte_level, tmp_path / name, **files))
        assert isinstance(template, HfChatTemplate)
        assert template.render([USER]) == expected
        assert template.stop_words == ("<|im_end|>",)
    extra = tmp_path / "file" / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("with tools")
    template = select(Tokenizer(tmp_path / "file"), tmp_path / "file")
    assert (template.render([USER]), template.render([USER], tools=[{}])) == ("in file", "with tools")


def test_the_users_choice_wins(byte_level: Path, tmp_path: Path) -> None:
    tokenizer, folder = checkpoint(byte_level, tmp_path / "m", chat_template_jinja="own")
    (tmp_path / "other.jinja").write_text("other {{ eos_token }}")
    assert select(tokenizer, folder, "llama3").render([USER]) == builtin("llama3").render([USER])
    assert select(tokenizer, folder, "hf").render([USER]) == "own"
    assert select(tokenizer, folder, str(tmp_path / "other.jinja")).render([USER]) == "other <|im_end|>"
    chosen = select(tokenizer, folder, ChatTemplateConfig("hf", stop_words=["x"]))
    assert (chosen.render([USER]), chosen.stop_words) == ("own", ("x",))
    with pytest.raises(ConfigError, match="no tags"):
        select(tokenizer, folder, ChatTemplateConfig("hf", user="x"))
    with pytest.raises(ConfigError, match=r"Unknown chat template 'lama3'.*llama3"):
        select(tokenizer, folder, "lama3")
    for name, content in (("broken.jinja", b"{{ a"), ("foreign.jinja", b"\xff"), ("none.jinja", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ConfigError, match=rf"The chat template {tmp_path / name} cannot be read: "
        ) as caught:
            select(tokenizer, folder, str(tmp_path / name))
        assert ".." not in str(caught.value)


def test_without_jinja_the_config_and_the_vocabulary_decide(byte_level: Path, tmp_path: Path) -> None:
    by_type = select(
        *checkpoint(byte_level, tmp_path / "llama2-vicuna-mistral", config={"model_type": "internlm2"})
    )
    assert by_type.render([USER]) == builtin("internlm2").render([USER])
    by_tokens = select(*checkpoint(byte_level, tmp_path / "llama", config={"model_type": "llama"}))
    assert by_tokens.render([USER]) == builtin("chatml").render([USER])


def test_without_any_evidence_prompts_stay_raw(wordpiece: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmdeploy_jax"):
        template = select(Tokenizer(wordpiece), wordpiece)
    assert "no chat template" in caplog.text
    assert template.render([USER]) == USER["content"]
    with pytest.raises(ConfigError, match="'hf' was asked for"):
        select(Tokenizer(wordpiece), wordpiece, "hf")
