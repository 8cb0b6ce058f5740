"""Flags: spelling, JSON, and that each one reaches the engine's configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from absl import flags as absl_flags

from lmdeploy_jax.cli.engine_flags import HELP, add_engine_flags, engine_config
from lmdeploy_jax.cli.flags import FlagSet, UsageError
from lmdeploy_jax.cli.generation_flags import add_generation_flags, generation_config
from lmdeploy_jax.config import JaxEngineConfig
from lmdeploy_jax.errors import ConfigError


@pytest.fixture
def flags() -> FlagSet:
    made = FlagSet()
    made.add("Talk", absl_flags.DEFINE_string, "prompt", None, "what to say")
    add_engine_flags(made)
    add_generation_flags(made)
    return made


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "--session-len", "77"],
        ["--session_len", "77", "m"],
        ["--session-len=77", "m"],
        ["m", "--session_len=77"],
        ["-session-len", "77", "m"],
    ],
)
def test_spellings(flags: FlagSet, argv: list[str]) -> None:
    assert flags.parse(argv) == ["m"]
    assert engine_config(flags).session_len == 77


def test_values_are_taken_as_they_are(flags: FlagSet) -> None:
    assert flags.parse(["--prompt", "--a-b=c", "--", "--not-a-flag"]) == ["--not-a-flag"]
    assert flags["prompt"] == "--a-b=c"


def test_boolean_flags(flags: FlagSet) -> None:
    flags.parse(["--noenable-prefix-caching"])
    assert engine_config(flags).enable_prefix_caching is False
    flags.parse(["--enable-prefix-caching"])
    assert engine_config(flags).enable_prefix_caching is True


def test_json_and_dotted_flags_merge(flags: FlagSet) -> None:
    flags.parse(
        [
            "--hf-overrides",
            '{"rope_scaling": {"factor": 2, "rope_type": "linear"}}',
            "--hf-overrides.rope_scaling.factor",
            "4.5",
            "--hf_overrides.model_type=my-type",
            "--hf_overrides.sizes=[1, 2]",
        ]
    )
    assert engine_config(flags).hf_overrides == {
        "rope_scaling": {"factor": 4.5, "rope_type": "linear"},
        "model_type": "my-type",
        "sizes": [1, 2],
    }


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--sesion-len", "3"], "session_len"),  # suggests the right name
        (["--session-len"], "needs a value"),
        (["--session-len", "many"], "many"),
        (["--backend", "tensorrt"], "tensorrt"),
        (["--hf-overrides", "{broken"], "not valid JSON"),
        (["--hf-overrides", "[1]"], "JSON object"),
        (["--hf-overrides", '{"a":' * 5000], "nested too deep"),
        (["--hf-overrides." + "a." * 5000 + "b", "1"], "nested too deep"),
    ],
)
def test_mistakes_are_named(flags: FlagSet, argv: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        flags.parse(argv)


def test_defaults_are_the_configs(flags: FlagSet) -> None:
    flags.parse([])
    assert engine_config(flags) == JaxEngineConfig()


@pytest.mark.parametrize(("alias", "backend"), [("turbomind", "pallas"), ("pytorch", "xla"), ("xla", "xla")])
def test_backend_aliases(flags: FlagSet, alias: str, backend: str) -> None:
    flags.parse(["--backend", alias])
    assert engine_config(flags).backend == backend


@pytest.mark.parametrize(("name", "policy"), [("int8", 8), ("fp8", 16), ("4", 4), ("none", 0)])
def test_quant_policies_have_lmdeploys_names(flags: FlagSet, name: str, policy: int) -> None:
    flags.parse(["--quant-policy", name])
    assert engine_config(flags).quant_policy == policy


def test_every_field_has_a_flag_that_reaches_it(flags: FlagSet) -> None:
    values: dict[str, Any] = {"dtype": "float16", "backend": "xla", "model_format": "awq", "quant_policy": 8}
    hints = get_type_hints(JaxEngineConfig)
    samples: dict[Any, Any] = {int: 3, float: 0.25, str: "x", dict[str, Any]: {"a": 1}}
    for field in fields(JaxEngineConfig):
        hint = hints[field.name]
        kinds = [hint] if hint in samples else [kind for kind in samples if kind in get_args(hint)]
        if hint is bool:
            value, text = not field.default, f"--{'no' if field.default else ''}{field.name}"
        else:
            value = values[field.name] if field.name in values else samples[kinds[0]]
            text = f"--{field.name}={value}"
        flags.parse([text.replace("'", '"')])
        assert getattr(engine_config(flags), field.name) == value


def test_help_shows_every_flag_with_its_default(flags: FlagSet) -> None:
    text = " ".join(flags.help().split())
    assert HELP.keys() == {field.name for field in fields(JaxEngineConfig)}
    for name, about in HELP.items():
        assert name.replace("_", "-") in text
        assert about in text
    assert "(default: 0.8)" in text


def test_generation_flags_lie_over_the_checkpoint(flags: FlagSet, tmp_path: Any) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_p": 0.5, "eos_token_id": 3}')
    flags.parse([])
    stored = generation_config(flags, tmp_path)
    assert (stored.do_sample, stored.top_p, stored.max_new_tokens) == (False, 0.5, 4096)
    flags.parse(["--temperature", "0.1", "--random-seed", "5"])
    given = generation_config(flags, tmp_path)
    assert (given.do_sample, given.temperature, given.top_p, given.random_seed) == (True, 0.1, 0.5, 5)


def test_generation_without_a_file_samples(flags: FlagSet, tmp_path: Any) -> None:
    flags.parse(["--max-new-tokens=7"])
    config = generation_config(flags, tmp_path)
    assert (config.do_sample, config.max_new_tokens) == (True, 7)
    flags.parse(["--top-p=7"])
    with pytest.raises(ConfigError, match="top_p"):
        generation_config(flags)
