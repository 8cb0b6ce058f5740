"""Codex and Claude Code, as npm installs them, through one round of a tool. A script speaks for the model, so
that the protocol is judged.

They are looked for in PATH; `npm install -g @openai/codex @anthropic-ai/claude-code` puts them there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.patience import PATIENCE
from tests.scripted import TOKENIZER, ids
from tests.server.live import serving
from tests.server.scripted import scripted

QUESTION, NOTE = "What does note.txt say?", "forty-two"
# The tool that runs a command, by the names that these programs have had for it, and its arguments.
SHELLS = {
    "exec_command": {"cmd": "cat note.txt"},
    "shell_command": {"command": "cat note.txt"},
    "shell": {"command": ["cat", "note.txt"]},
    "Bash": {"command": "cat note.txt", "description": "Read the note"},
}


class Agent:
    """What the model says: a call of the shell, then its answer. `results`: what the shell has said."""

    def __init__(self) -> None:
        self.results: list[str] = []

    def __call__(self, request, index):
        prompt = TOKENIZER.decode(request.prompt.ids, skip_special_tokens=False)
        offered = re.findall(r'\{"name": "(\w+)"', prompt)
        shell = next((name for name in SHELLS if name in offered), None)
        if shell is None or QUESTION not in prompt:  # a request on the side, for a title perhaps
            return ids("A note")
        if "<tool_response>" in prompt:
            self.results.append(prompt.rpartition("<tool_response>")[2])
            return ids(f"It says {NOTE.upper()}.")
        return ids(f"<tool_call>\n{json.dumps({'name': shell, 'arguments': SHELLS[shell]})}\n</tool_call>")


@pytest.fixture
def play(tmp_path):
    """Runs a program in a folder with a note; gives what it prints and the prompts with the tool's result."""

    def run(name, arguments, environment, prepare=lambda home, url: None):
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"{name} is not installed")
        work, home = tmp_path / "work", tmp_path / "home"
        work.mkdir()
        home.mkdir()
        (work / "note.txt").write_text(NOTE + "\n")
        agent = Agent()
        with scripted(agent, session_len=200_000) as (frontend, _), serving(frontend) as live:
            prepare(home, live.url)
            own = {"PATH": os.environ["PATH"], "HOME": str(home)} | environment(live.url)
            done = subprocess.run(
                [program, *arguments, QUESTION],
                cwd=work,
                env=own,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout, agent.results

    return run


def check(printed, results) -> None:
    assert NOTE in results[-1], "the tool's result has come back"
    assert NOTE.upper() in printed


def test_codex(play):
    def configure(home, url):
        (home / ".codex").mkdir()
        (home / ".codex" / "config.toml").write_text(
            'model = "tiny-chat"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
            f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "LOCAL_KEY"\n'
        )

    flags = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    check(*play("codex", flags, lambda url: {"LOCAL_KEY": "none"}, configure))


def test_claude_code(play):
    def environment(url):
        models = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
        own = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "none"}
        return own | dict.fromkeys(models, "tiny-chat") | {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}

    check(*play("claude", ["-p", "--allowedTools", "Bash(cat:*)", "--"], environment))
