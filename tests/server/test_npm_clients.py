"""The clients that npm has, driven by the programs in `npm/`. A script speaks for the model.

They are looked for in this checkout and among npm's global packages: `npm install --no-save openai
@anthropic-ai/sdk ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/anthropic`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.server.adding import FORM, SENTENCE, adding
from tests.server.browser import node_modules
from tests.server.live import serving
from tests.server.scripted import scripted

PROGRAMS = Path(__file__).parent / "npm"


@pytest.fixture
def seen(tmp_path):
    """Runs a program that needs these packages; gives what it has seen."""

    def run(program, *packages):
        found = next((p for p in node_modules() if all((p / name).exists() for name in packages)), None)
        if found is None:
            pytest.skip(f"needs {' '.join(packages)} of npm")
        (tmp_path / "node_modules").symlink_to(found)
        copy = shutil.copy(PROGRAMS / program, tmp_path)
        with scripted(adding, session_len=16_384) as (frontend, _), serving(frontend) as live:
            done = subprocess.run(["node", copy, live.url], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_openai(seen):
    found = seen("openai.mjs", "openai")
    assert found.pop("vectors") == 2
    assert found.pop("models") == ["tiny-chat"]
    assert found.pop("parsed") == FORM
    assert set(found.values()) == {SENTENCE}, found


def test_anthropic(seen):
    """Its tool runner asks for a thread first, is told that there is none, and goes on without."""
    found = seen("anthropic.mjs", "@anthropic-ai/sdk")
    assert found.pop("models") == [["tiny-chat", "model"]]
    assert found.pop("form") == FORM
    assert found.pop("tokens")
    assert set(found.values()) == {SENTENCE}, found


def test_vercel(seen):
    found = seen("vercel.mjs", "ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "@ai-sdk/anthropic")
    assert found.pop("vector")
    assert set(found) == {"compatible", "chat", "responses", "messages"}
    for provider in found.values():
        assert provider.pop("object") == provider.pop("streamedObject") == {"x": 42}
        assert set(provider.values()) == {SENTENCE}, found
