"""Checkpoint folders changed at random: what is harmless loads as the same model, the rest loads as in
transformers or ends in an error that names the fault. Never a traceback, never for long.

`python -m tests.converters.test_checkpoint_fuzz N` repeats case N and prints what became of it.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdeploy_jax.assets import TINY_CHAT
from lmdeploy_jax.converters import orbax
from lmdeploy_jax.converters.load import LoadedModel, load_model
from lmdeploy_jax.engine.prepare import prepare
from lmdeploy_jax.errors import CheckpointError, ConfigError, RequestError
from tests.converters import harmful, harmless
from tests.models.paged import PagedRunner, named_leaves
from tests.oracle import hf_logits, save_checkpoint

SAVED = ("llama_llama3", "gemma3", "qwen3_everything", "phi3_longrope")
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TEXT = "Hello, wörld! <|im_end|>12"
SECONDS = 10  # of CPU time of this process, whatever else the machine does
HARMLESS_SHARE, CONVERTED_SHARE = 0.4, 0.05
WEIGHTY = ("config_values", "plausible_fields", "plausible_rope")  # drawn three times as often as the others
ALL_HARMFUL = harmful.CHANGES | {"converted_files": harmful.converted_files}
IDS = list(range(3, 60))


@dataclass(frozen=True)
class Case:
    """A checkpoint and what is done to it, the same for a number at any time."""

    number: int
    base: str
    changes: tuple[str, ...]
    harmless: bool

    def make(self, base: Path, folder: Path) -> Path:
        rng = random.Random(f"changes {self.number}")
        shutil.copytree(base, folder)
        for name in self.changes:
            (harmless.CHANGES if self.harmless else ALL_HARMFUL)[name](folder, rng)
        return folder


def draw(number: int) -> Case:
    rng = random.Random(number)
    base = rng.choice([*SAVED, "tiny-chat"])
    if rng.random() < CONVERTED_SHARE:
        return Case(number, "converted", ("converted_files",), False)
    if rng.random() < HARMLESS_SHARE:
        return Case(number, base, tuple(rng.sample(sorted(harmless.CHANGES), rng.randint(1, 3))), True)
    return Case(number, base, (rng.choice([*sorted(harmful.CHANGES), *WEIGHTY * 2]),), False)


@dataclass(frozen=True)
class Found:
    """All that is read from a checkpoint folder before a request comes."""

    model: LoadedModel
    text: tuple[Any, ...]  # what tokenizer and template make of a few samples

    def same_model(self, other: Found) -> bool:
        mine, theirs = self.model, other.model
        return (
            mine.config == theirs.config
            and list(named_leaves(mine)) == list(named_leaves(theirs))
            and all(map(np.array_equal, mine.leaves, theirs.leaves))
        )


def read(folder: Path) -> Found:
    prepared = prepare(folder)
    tokenizer, template = prepared.tokenizer, prepared.template
    rendered = template.render([{"role": "user", "content": "hi"}])
    text = (tokenizer.encode(TEXT), tokenizer.eos_token_ids, len(tokenizer), rendered, template.stop_words)
    return Found(load_model(folder), text)


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises in this thread once the process has used so much CPU time."""

    def end(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def make_bases(scratch: Path) -> dict[str, Path]:
    folders = {name: save_checkpoint(name, scratch / name) for name in SAVED}
    for folder in folders.values():
        for name in BESIDE:
            shutil.copy(TINY_CHAT / name, folder / name)
    leaves = named_leaves(load_model(TINY_CHAT))
    return folders | {"tiny-chat": TINY_CHAT, "converted": orbax.save(scratch / "out", leaves, {}, TINY_CHAT)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def judge(case: Case, bases: dict[str, Path], plain: dict[str, Found], *, compare: bool) -> str:
    """What became of a case. Raises AssertionError where that is wrong, and lets other errors through."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = case.make(bases[case.base], Path(scratch) / "model")
        found = read_or_refuse(folder)
        if not isinstance(found, Found):
            assert case.harmless is False, found
            return found.split(":")[0]
        same_model = found.same_model(plain[case.base])
        same_text = found.text == plain[case.base].text
        assert (same_model and same_text) or not case.harmless, f"same model {same_model}, text {same_text}"
        if not same_model and case.base != "converted":
            return compared(found.model, folder) if compare else "another model"
        return "the same" if same_text else "another text"


def read_or_refuse(folder: Path) -> Found | str:
    """What the folder holds, or the error that refuses it, which must say where the fault is."""
    try:
        with cpu_limit(SECONDS):
            return read(folder)
    except (CheckpointError, ConfigError, RequestError) as error:
        refusal, message = type(error).__name__, str(error)
    if str(folder) not in message and "chat template" not in message:
        raise AssertionError(f"{refusal} without a place: {message}")
    return f"{refusal}: {message}"


def compared(model: LoadedModel, folder: Path) -> str:
    """Asserts that a changed model says what transformers makes it say."""
    try:
        theirs = hf_logits(folder, IDS)
    except Exception:  # it checks the types of fields that no forward pass reads
        return "loads here only"
    (ours,) = PagedRunner(model).ragged([(0, 0, IDS, len(IDS))])
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max(), "other logits than transformers"
    return "as transformers"


def run(
    numbers: range, bases: dict[str, Path], *, forwards: int
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts of (kind, outcome), and a line for each case that went wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    plain = {name: read(folder) for name, folder in bases.items()}
    for case in map(draw, numbers):
        kind = "harmless" if case.harmless else case.changes[0]
        try:
            outcome = judge(case, bases, plain, compare=forwards > 0)
        except Exception as error:
            faults.append(
                f"case {case.number}, {case.base} with {case.changes}: {type(error).__name__}: {error}"
            )
            continue
        forwards -= outcome in ("as transformers", "loads here only")
        counts[kind, outcome] += 1
    return counts, faults


def test_changed_checkpoints(bases: dict[str, Path]) -> None:
    counts, faults = run(range(100), bases, forwards=3)
    assert not faults, "\n".join(faults)
    assert counts["harmless", "the same"] >= 30


@pytest.mark.full
def test_many_changed_checkpoints(bases: dict[str, Path]) -> None:
    counts, faults = run(range(1000, 1500), bases, forwards=500)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:24}{outcome:24}{count:5}")
    assert not faults, "\n".join(faults)
    assert counts["harmless", "the same"] >= 150
    assert sum(counts.values()) == 500


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base_folder:
        made = make_bases(Path(base_folder))
        case = draw(int(sys.argv[1]))
        print(case)
        print(judge(case, made, {name: read(folder) for name, folder in made.items()}, compare=True))
