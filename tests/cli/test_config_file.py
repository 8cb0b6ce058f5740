"""`serve --config FILE`: the file's flags, below the command line's."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy_jax.cli import serve
from lmdeploy_jax.cli.engine_flags import engine_config
from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.errors import ConfigError

GOOD = """
server-port: 8080
api_keys: [one, two]
enable_prefix_caching: false
cache-max-entry-count: 0.5
hf_overrides: {rope_scaling: {factor: 2.0, type: linear}}
session_len:
"""


@pytest.fixture
def flags() -> FlagSet:
    made = FlagSet()
    serve.define(made)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(GOOD)
    return path


def test_the_file_sets_flags(flags: FlagSet, file: Path) -> None:
    assert flags.parse(["api_server", "m", "--config", str(file)]) == ["api_server", "m"]
    assert (flags["server_port"], flags["api_keys"]) == (8080, ["one", "two"])
    config = engine_config(flags)
    assert config.enable_prefix_caching is False
    assert config.cache_max_entry_count == 0.5
    assert config.hf_overrides == {"rope_scaling": {"factor": 2.0, "type": "linear"}}
    assert config.session_len is None


def test_the_command_line_wins(flags: FlagSet, file: Path) -> None:
    given = ["--server-port", "9", "--enable-prefix-caching", "--hf-overrides.rope_scaling.factor", "4.0"]
    flags.parse(["api_server", *given, "--config", str(file)])
    assert flags["server_port"] == 9
    config = engine_config(flags)
    assert config.enable_prefix_caching is True
    assert config.hf_overrides == {"rope_scaling": {"factor": 4.0, "type": "linear"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sevrer_port: 1", "sevrer_port"),
        ("config: other.yaml", "config"),
        ("server_port: many", "server_port=many: a whole number is needed"),
        ("server_port: [1]", "server_port"),
        ("server_port: true", "server_port"),
        ("enable_prefix_caching: 3", "enable_prefix_caching"),
        ("hf_overrides: 3", "hf_overrides"),
        ("- a", "name: value"),
        ("a: [", "YAML"),
        ("a: " + "[" * 3000, "YAML"),
        ("a: 2020-99-99", "YAML"),
        ("a: !!timestamp 3", "YAML"),
    ],
)
def test_what_does_not_fit_is_named(flags: FlagSet, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        flags.parse(["api_server", "--config", str(path)])
    assert str(path) in str(error.value)


def test_a_missing_file_is_named_and_an_empty_one_is_nothing(flags: FlagSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        flags.parse(["api_server", "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("")
    assert flags.parse(["api_server", "--config", str(tmp_path / "empty.yaml")]) == ["api_server"]


@pytest.mark.parametrize(
    "argv",
    [
        ["api_server", "m", "--api-keys", "a,b"],
        ["api_server", "m", "--api-keys", "a", "b", "--server-port", "9"],
        ["--api-keys", "a", "--api_keys=b", "api_server", "m"],
        ["api-server", "m", "--api-keys", "a", "--allow-origins", "x", "y", "--api-keys", "b"],
        ["m", "--api-keys", "a", "b"],
    ],
)
def test_lists_are_given_in_every_usual_form(flags: FlagSet, argv: list[str]) -> None:
    assert flags.parse(argv)[-1] == "m"
    assert flags["api_keys"] == ["a", "b"]
    assert flags["allow_origins"] == (["x", "y"] if "x" in argv else ["*"])


def test_a_model_may_follow_a_list(flags: FlagSet) -> None:
    assert flags.parse(["api_server", "--api-keys", "a", "m"]) == ["api_server", "m"]
    assert flags["api_keys"] == ["a"]


def test_the_help_says_how_a_list_is_given(flags: FlagSet) -> None:
    text = " ".join(flags.help().split())
    assert "--api-keys TEXT,TEXT,… keys of which a client must send one --" in text
    assert "--allow-origins TEXT,TEXT,… origins that browsers may call from (CORS) (default: *)" in text
