"""Whatever two JSON files say, they become a config or an error of ours that names the field."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_jax.converters.vision_config import PROCESSOR_FILES, read_vision
from lmdeploy_jax.errors import LmdeployError
from tests.converters.harmful import VALUES, places, put
from tests.fuzz import cases
from tests.vision.oracle import CONFIGS, save_checkpoint

Files = Mapping[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Files]:
    """The JSON files of every family's checkpoint."""
    found = []
    for name in CONFIGS:
        folder = save_checkpoint(name, tmp_path_factory.mktemp(name))
        names = ["config.json", *(name for name, _ in PROCESSOR_FILES)]
        paths = [folder / name for name in names if (folder / name).is_file()]
        found.append({path.name: json.loads(path.read_text()) for path in paths})
    return found


@cases(20_000)
def test_damaged_values(cases: int, files: list[Files], tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(cases):
        changed = copy.deepcopy(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(changed))
            if found := places(changed[name]):
                value = rng.choice(VALUES)  # copied where another could be put in it: into itself, for one
                fresh = copy.deepcopy(value) if type(value) in (list, dict) else value
                put(changed[name], rng.choice(found), fresh)
        for name in ("config.json", *(name for name, _ in PROCESSOR_FILES)):
            (tmp_path / name).unlink(missing_ok=True)
            if name in changed:
                (tmp_path / name).write_text(json.dumps(changed[name]))
        with suppress(LmdeployError):
            _, config = read_vision(tmp_path)
            config.processor.plan(60, 85)
