"""Programs written for LMDeploy: its names, where it has them, and what they do."""

from __future__ import annotations

import asyncio
import importlib

import pytest

import lmdeploy_jax as lmdeploy
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.engine.io.frontend import Frontend
from lmdeploy_jax.errors import ConfigError, RequestError
from lmdeploy_jax.messages import GenerationConfig, QuantPolicy, SpeculativeConfig
from lmdeploy_jax.model import MODELS, BaseChatTemplate, ChatTemplateConfig
from lmdeploy_jax.text.builtin_templates import builtin
from lmdeploy_jax.text.chat_template import select
from tests.fake_engine import FakeEngine
from tests.scripted import TOKENIZER, echo, opener

ASK = [{"role": "user", "content": "hi"}]
NAMES = {
    "": "pipeline Tokenizer GenerationConfig __version__ version_info ChatTemplateConfig PytorchEngineConfig "
    "TurbomindEngineConfig VisionConfig Pipeline",
    "messages": "GenerationConfig PytorchEngineConfig TurbomindEngineConfig VisionConfig SpeculativeConfig "
    "QuantPolicy Response ResponseType EngineOutput RequestMetrics ScheduleMetrics EngineEvent EventType "
    "LogitsProcessor",
    "model": "MODELS BaseChatTemplate ChatTemplateConfig",
    "serve.openai.api_client": "APIClient get_model_list",
    "vl": "load_image load_video encode_image_base64 encode_video_base64",
    "vl.constants": "IMAGE_TOKEN",
    "vl.utils": "load_image encode_image_base64 encode_video_base64",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_stand_where_lmdeploy_has_them(module: str) -> None:
    found = importlib.import_module(f"lmdeploy_jax.{module}".rstrip("."))
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_the_version_is_its_numbers() -> None:
    assert ".".join(map(str, lmdeploy.version_info)) == lmdeploy.__version__


def test_older_names_of_infer_and_of_the_stream() -> None:
    with opener() as opened:
        pipe, _ = opened(echo)
        (answer,) = pipe.batch_infer(["hi"], gen_config=GenerationConfig(), do_preprocess=False)
        assert answer.text == pipe("hi", do_preprocess=False).text

        async def pieces() -> list[str]:
            return [piece.text async for piece in pipe.generate("hi", do_preprocess=False)]

        assert "".join(asyncio.run(pieces())) == answer.text


def test_a_config_of_lmdeploys_is_translated_under_its_enum() -> None:
    assert lmdeploy.PytorchEngineConfig(quant_policy=QuantPolicy.INT8).to_jax().quant_policy == 8
    with pytest.raises(ConfigError, match=r"quant_policy=.*TURBO_QUANT.*TurboQuant, is not implemented"):
        lmdeploy.PytorchEngineConfig(quant_policy=QuantPolicy.TURBO_QUANT)
    with pytest.raises(ConfigError, match="speculative_config"):
        lmdeploy.pipeline("no such model", speculative_config=SpeculativeConfig("eagle3"))


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("return_ppl", True, "get_ppl"),
        ("with_cache", True, "one engine"),
        ("migration_request", 5, "one engine"),
    ],
)
def test_fields_without_a_meaning_take_their_neutral_value_alone(field, value, remedy) -> None:
    GenerationConfig(return_ppl=False, with_cache=False, preserve_cache=False, migration_request=None)
    with pytest.raises(ConfigError, match=f"{field}=.*{remedy}"):
        GenerationConfig(**{field: value})


def test_words_become_ids_where_they_are_tokens() -> None:
    config = GenerationConfig(stop_words=["</s> of no token", TOKENIZER.eos_token], stop_token_ids=[7])
    config.convert_stop_bad_words_to_ids(TOKENIZER)
    assert config.stop_token_ids == [TOKENIZER.eos_token_id, 7]
    assert config.bad_token_ids is None
    config.update_from_hf_gen_cfg({"eos_token_id": [8, 7]}, 9)
    assert config.stop_token_ids == [TOKENIZER.eos_token_id, 7, 9, 8]


@pytest.fixture
def registered():
    """Registers a class under a name that is free again afterwards."""
    names: list[str] = []

    def register(name: str, **methods: object) -> type[BaseChatTemplate]:
        names.append(name)
        return MODELS.register_module(name=name)(type(name, (BaseChatTemplate,), methods))

    yield register
    for name in names:
        del MODELS.module_dict[name]


def test_a_registered_class_prints_the_prompts_of_a_pipeline(registered) -> None:
    def init(self, meta_instruction="Be kind."):
        BaseChatTemplate.__init__(self, meta_instruction=meta_instruction, user="U:", stop_words=["END"])

    def messages2prompt(self, messages, sequence_start=True):
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        return self.meta_instruction + "".join(f"{self.user}{message['content']}" for message in messages)

    registered("mine", __init__=init, messages2prompt=messages2prompt)
    with pytest.raises(ConfigError, match="'mine' cannot be made: TypeError"):
        select(TOKENIZER, TINY_CHAT, ChatTemplateConfig("mine", user="V:"))
    template = select(TOKENIZER, TINY_CHAT, ChatTemplateConfig("mine"))
    assert template.stop_words == ("END",)
    tools = [{"type": "function", "function": {"name": "f"}}]
    frontend = Frontend(FakeEngine(TINY_CHAT, echo), TOKENIZER, template)
    with lmdeploy.Pipeline.from_frontend(frontend) as pipe:
        assert pipe("hi").text.startswith("Be kind.U:hi")
        assert "takes no tools" in pipe("hi", tools=tools).error_message


def test_what_a_registered_class_does_wrong_fails_the_request_alone(registered) -> None:
    registered("dies", messages2prompt=lambda self, messages: 1 / 0)
    registered("numbers", messages2prompt=lambda self, messages, **kwargs: 5)
    for name, text in (("dies", "ZeroDivisionError"), ("numbers", "gave 5")):
        with pytest.raises(RequestError, match=text):
            select(TOKENIZER, TINY_CHAT, name).render(ASK)
    with pytest.raises(RequestError, match="opens an answer"):
        select(TOKENIZER, TINY_CHAT, "numbers").render([*ASK, {"role": "assistant", "content": "yes"}])


def test_a_name_is_taken_once(registered) -> None:
    registered("once")
    with pytest.raises(KeyError, match="'once' is registered"):
        MODELS.register_module(name="once")(BaseChatTemplate)
    with pytest.raises(KeyError, match="'qwen'"):
        MODELS.register_module(name="qwen", module=BaseChatTemplate)
    with pytest.raises(ConfigError, match="subclass of BaseChatTemplate"):
        MODELS.register_module(name="odd", module=dict)
    other = type("Other", (BaseChatTemplate,), {})
    assert MODELS.register_module(name="once", force=True, module=other) is other is MODELS.get("once")


@pytest.mark.parametrize("name", ["qwen", "llama2", "vicuna", "llava-v1", "internlm2", "base"])
def test_built_in_templates_are_classes_too(name: str) -> None:
    kind = MODELS.get(name)
    assert kind is not None
    assert kind().messages2prompt(ASK) == builtin(name).render(ASK)
    assert ChatTemplateConfig(name).chat_template.messages2prompt(ASK) == builtin(name).render(ASK)


def test_a_config_shows_what_it_prints() -> None:
    tags = {"user": "<U>", "eoh": "</U>", "assistant": "<A>", "separator": "|"}
    template = ChatTemplateConfig("new", **tags, meta_instruction="meta").chat_template
    assert template.get_prompt("hi") == "meta<U>hi</U><A>" == template.messages2prompt("hi")
    assert template.get_prompt("hi", sequence_start=False) == "|<U>hi</U><A>"
    assert (
        ChatTemplateConfig("new", **tags, capability="completion").chat_template.messages2prompt(ASK) == "hi"
    )
