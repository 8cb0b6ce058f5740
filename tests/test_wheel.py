"""What is installed from a wheel works in a folder that holds a user's own modules of like names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lmdeploy_jax

ROOT = Path(lmdeploy_jax.__file__).parent.parent
FOLDERS = ("lmdeploy_jax", "converters", "pallas_kernels", "configs", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
USERS = "raise AssertionError('this module is the user\\'s own')\n"
SCRIPT = """
from pathlib import Path
import lmdeploy_jax
from lmdeploy_jax.bench import shapes
from lmdeploy_jax.converters.load import load_model
from lmdeploy_jax.engine.core.engine import Engine
from lmdeploy_jax.models.tuning import UNTUNED, load
from lmdeploy_jax.pallas_kernels import registry
from lmdeploy_jax.server.run import Server
print(lmdeploy_jax.__file__)
assert "llama3-8b" in shapes.names(), shapes.FOLDER
assert load("NVIDIA H200", Path("nowhere")) != UNTUNED, "the tables of kernels are missing"
"""


def built(source: Path, hook: str, out: Path) -> Path:
    """What setuptools builds of a source folder, as pip has it do."""
    out.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, hook, str(out)], cwd=source, capture_output=True, check=True)
    (file,) = out.iterdir()
    return file


def contents(wheel: Path) -> dict[str, int]:
    """Name -> checksum of each file, without the list of names and checksums."""
    with zipfile.ZipFile(wheel) as file:
        return {info.filename: info.CRC for info in file.infolist() if not info.filename.endswith("RECORD")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(source, "build_wheel", tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *command: str) -> str:
    """The output of Python in a user's folder, on what is installed."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with modules and packages of the likeliest names."""
    (tmp_path / "converters.py").write_text(USERS)
    for name in ("configs", "pallas_kernels", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(USERS)
    return tmp_path


def test_a_wheel_takes_one_name_and_brings_its_data(wheel: Path) -> None:
    names = contents(wheel)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lmdeploy_jax"}
    for name in (
        "llama3-8b.json",
        "nvidia-h200.json",
        "model.safetensors",
        "chat.html",
        "chat.js",
        "tokenizer.json",
    ):
        assert [found for found in names if found.endswith(f"/{name}")], name
    assert not [name for name in names if "docker" in name or "__pycache__" in name]


def test_it_works_beside_a_users_own_modules(installed: Path, folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT)
    assert run(installed, folder, "script.py") == f"{installed / 'lmdeploy_jax' / '__init__.py'}\n"
    assert "lmdeploy_jax" in run(installed, folder, "-m", "lmdeploy_jax", "check_env")


def test_a_source_distribution_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    packed = built(source, "build_sdist", tmp_path / "sdist")
    with tarfile.open(packed) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / packed.name.removesuffix(".tar.gz")
    assert contents(built(unpacked, "build_wheel", tmp_path / "wheel")) == contents(wheel)
