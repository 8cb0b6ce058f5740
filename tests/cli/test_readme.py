"""What the README says about code is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import lmdeploy_jax
from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.cli import serve
from lmdeploy_jax.cli.engine_flags import engine_config
from lmdeploy_jax.cli.flags import FlagSet
from lmdeploy_jax.cli.main import COMMANDS
from lmdeploy_jax.converters.config import read_config
from lmdeploy_jax.converters.families import FAMILIES
from lmdeploy_jax.converters.text_part import TEXT_PARTS

ROOT = Path(lmdeploy_jax.__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
TOPS = ("lmdeploy_jax", "pallas_kernels", "converters", "configs", "tests", "benchmarks", "docs", ".ci")


def test_the_table_of_models_is_the_code() -> None:
    named = set(re.findall(r"`(\w+(?:ForCausalLM|ForConditionalGeneration|ChatModel))`", README))
    assert named == FAMILIES.keys() | TEXT_PARTS.keys()


def test_the_table_of_commands_is_the_code() -> None:
    assert set(re.findall(r"^\| `lmdeploy_jax (\w+)", README, re.M)) == set(COMMANDS)


def test_the_example_of_an_override_works_with_the_default_model() -> None:
    (example,) = re.findall(r"`(--hf-overrides[^`]*)`", README)
    flags = FlagSet()
    serve.define(flags)
    flags.parse(shlex.split(example))
    assert read_config(TINY_CHAT, engine_config(flags).hf_overrides).ropes[0].factor == 2


def test_the_map_names_every_folder() -> None:
    text = (ROOT / "WORKSPACE.md").read_text()
    for top in ("lmdeploy_jax", "pallas_kernels", "converters"):
        for folder in (ROOT / top).iterdir():
            if (folder / "__init__.py").exists():
                assert f"{folder.name}/" in text, folder


@pytest.mark.parametrize(
    "page", [ROOT / "WORKSPACE.md", ROOT / "README.md", *DOCS], ids=lambda page: page.name
)
def test_the_pages_name_files_that_there_are(page: Path) -> None:
    paths = {f"/{path.relative_to(ROOT)}" for top in TOPS for path in (ROOT / top).rglob("*")}
    paths |= {f"/{path.name}" for path in ROOT.glob("*.md")}
    paths |= {f"/lmdeploy_jax{path}" for path in paths}
    named = re.findall(r"(?<![\w/.~-])(?:\w+/)*\w+\.(?:py|md)\b", page.read_text())
    assert {name for name in named if not any(path.endswith(f"/{name}") for path in paths)} == set()


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = [line for line in script.splitlines() if re.match(r"python3 |\"\$venv", line)]
    command = " && ".join(steps).replace('"$venv"', ".venv")
    command = re.sub(r'"\$venv(/bin/\w+)"', r".venv\1", command)
    assert "-m pytest" in command
    assert command in README
