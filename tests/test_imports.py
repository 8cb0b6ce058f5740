"""Who may import whom: the layers of the project, and the libraries that stay behind one door."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BESIDE = ("pallas_kernels", "converters")  # folders of their own at the top, packages of lmdeploy_jax
SOURCES = sorted(path for top in ("lmdeploy_jax", *BESIDE) for path in (ROOT / top).rglob("*.py"))

# Lower numbers are imported by higher ones, never the other way round. The longest matching prefix counts.
LAYERS = {
    "lmdeploy_jax.errors": 0,
    "lmdeploy_jax.checked": 0,
    "lmdeploy_jax.messages": 1,
    "lmdeploy_jax.config": 1,
    "lmdeploy_jax.logs": 1,
    "lmdeploy_jax.prompt": 1,
    "lmdeploy_jax.assets": 1,
    "lmdeploy_jax.pallas_kernels": 2,
    "lmdeploy_jax.hub": 2,
    "lmdeploy_jax.hub_download": 2,
    "lmdeploy_jax.text": 2,
    "lmdeploy_jax.session": 2,
    "lmdeploy_jax.cache": 2,
    "lmdeploy_jax.parallel": 2,
    "lmdeploy_jax.sampling": 3,
    "lmdeploy_jax.guided": 3,
    "lmdeploy_jax.models": 3,
    "lmdeploy_jax.vision": 3,
    "lmdeploy_jax.vision.families": 4,
    "lmdeploy_jax.converters": 4,
    "lmdeploy_jax.lite": 5,
    "lmdeploy_jax.engine": 5,
    "lmdeploy_jax.engine.io": 6,
    "lmdeploy_jax.engine.core": 6,
    "lmdeploy_jax.engine.process": 7,
    "lmdeploy_jax": 8,  # the package's own face, and every other module that lies directly in it
    "lmdeploy_jax.server": 9,
    "lmdeploy_jax.bench": 9,
    "lmdeploy_jax.proxy": 9.5,
    "lmdeploy_jax.ray_serve": 9.7,
    "lmdeploy_jax.cli": 10,
    "lmdeploy_jax.__main__": 11,
}
WITHOUT_JAX = (
    "lmdeploy_jax.errors",
    "lmdeploy_jax.checked",
    "lmdeploy_jax.messages",
    "lmdeploy_jax.config",
    "lmdeploy_jax.logs",
    "lmdeploy_jax.prompt",
    "lmdeploy_jax.text",
    "lmdeploy_jax.guided",
    "lmdeploy_jax.converters.config",
    "lmdeploy_jax.converters.families",
    "lmdeploy_jax.hub",
    "lmdeploy_jax.cache.kinds",
    "lmdeploy_jax.cache.layout",
    "lmdeploy_jax.cache.manager",
    "lmdeploy_jax.cache.pages",
    "lmdeploy_jax.cache.prefix",
    "lmdeploy_jax.engine.base",
    "lmdeploy_jax.engine.decoder_config",
    "lmdeploy_jax.engine.facts",
    "lmdeploy_jax.engine.io",
    "lmdeploy_jax.engine.prepare",
    "lmdeploy_jax.engine.process.remote",
    "lmdeploy_jax.engine.request",
    "lmdeploy_jax.engine.core.scheduler",
    "lmdeploy_jax.engine.process.wire",
    "lmdeploy_jax.engine.process.worker",
    "lmdeploy_jax.server",
    "lmdeploy_jax.vision.access",
    "lmdeploy_jax.vision.config",
    "lmdeploy_jax.vision.families",
    "lmdeploy_jax.vision.fetch",
    "lmdeploy_jax.vision.inputs",
    "lmdeploy_jax.vision.interpolate",
    "lmdeploy_jax.vision.load",
    "lmdeploy_jax.vision.mrope",
    "lmdeploy_jax.vision.packing",
    "lmdeploy_jax.vision.pixels",
    "lmdeploy_jax.vision.placeholders",
    "lmdeploy_jax.vision.positions",
    "lmdeploy_jax.vision.processor",
    "lmdeploy_jax.vision.resize",
)
# LMDeploy's `messages` has the configs as well.
ALLOWED = {"lmdeploy_jax.messages": ("lmdeploy_jax.config",)}
BY_TRANSFORMERS = "lmdeploy_jax.text.transformers_backend"  # tokenizers that nothing else reads
TRAINING = "lmdeploy_jax.assets."  # makes the embedded models; nothing at run time imports it
ENVIRONMENT_READERS = {
    "lmdeploy_jax.engine.core.compile",  # the user's cache folder, as the XDG standard has it
    "lmdeploy_jax.engine.core.program_cache",  # XLA's own flags, which are part of a compiled program's name
    "lmdeploy_jax.cli.lmdeploy_flags",  # a certificate's files, as LMDeploy's --ssl finds them
    "lmdeploy_jax.cli.probes",  # reports the variables that change how JAX works
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in BESIDE:
        parts = ("lmdeploy_jax", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules (and names from modules, which may be modules) that a file imports, at any depth."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def layer(module: str) -> int | None:
    parts = module.split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LAYERS[name] for name in known if name in LAYERS), None)


def offences(path: Path) -> Iterator[str]:
    """Everything in one file that breaks a rule."""
    name = module_name(path)
    for target in set(imports(path)):
        line = f"{name} imports {target}"
        top = target.split(".")[0]
        above, own = layer(target), layer(name)
        if top in BESIDE:
            yield f"{line}: it is lmdeploy_jax.{top}, or it would be the user's own folder of that name"
        if above is not None and own is not None and above > own and target != "lmdeploy_jax":
            yield f"{line}: against the direction of imports"
        if own == 1 and top == "lmdeploy_jax" and above == 1 and not within(target, near(name)):
            yield f"{line}: it may import errors and checked only"
        if top == "jax" and within(name, WITHOUT_JAX):
            yield f"{line}: it works without JAX"
        if target.startswith("jax._src"):
            yield f"{line}: public JAX API only"
        if top in ("jax_triton", "triton"):
            yield f"{line}: no dependency of this project"
        if top in ("torch", "transformers") and not name.startswith((TRAINING, BY_TRANSFORMERS)):
            yield f"{line}: a library of the tests"


def near(name: str) -> tuple[str, ...]:
    return (parent(name), *ALLOWED.get(name, ()))


def parent(name: str) -> str:
    """`lmdeploy_jax.assets` for its modules, the module itself for single files."""
    return ".".join(name.split(".")[:2])


def test_imports_follow_the_table() -> None:
    assert sorted(line for path in SOURCES for line in offences(path)) == []


def test_protocols_of_the_server_know_nothing_of_each_other() -> None:
    """What two of them need lies beside their folders. `chat` is what the chat protocols share."""
    server = "lmdeploy_jax.server."
    shared = {"chat", "http", "routes", "static"}
    folders = {path.name for path in (ROOT / "lmdeploy_jax" / "server").iterdir() if path.is_dir()}
    protocols = folders - shared - {"__pycache__"}
    for path in SOURCES:
        own = module_name(path).removeprefix(server).split(".")[0]
        if module_name(path).startswith(server) and own in folders:
            others = tuple(server + name for name in protocols - {own})
            assert not [target for target in imports(path) if within(target, others)], path


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for types alone count too. The package's own face is no module among others, and the tasks of
    the embedded model's training are one circle.
    """
    modules = {module_name(path): path for path in SOURCES if "tasks" not in path.parts}
    del modules["lmdeploy_jax"]
    graph = {name: _imported(path, modules) - {name} for name, path in modules.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def _imported(path: Path, modules: Container[str]) -> set[str]:
    """The modules that a file imports; of `from package import module` the module alone."""
    found = {target for target in imports(path) if target in modules}
    return found - {target.rpartition(".")[0] for target in found}


def test_the_package_and_the_command_line_start_without_jax() -> None:
    code = (
        "import sys, lmdeploy_jax, lmdeploy_jax.cli.main as main; "
        "main.main(['--help']); main.main(['chat', '--help']); main.main(['bench', '--help']); "
        "heavy = {'jax', 'flax', 'tokenizers', 'orbax'} & sys.modules.keys(); print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_nothing_at_run_time_imports_the_training_code() -> None:
    for path in SOURCES:
        if not module_name(path).startswith(TRAINING):
            assert not [target for target in imports(path) if target.startswith(TRAINING + "train")], path


def test_environment_variables_are_not_configuration() -> None:
    readers = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(module_name(path))
    assert readers <= ENVIRONMENT_READERS


def test_dependencies_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("ray", "video", "transformers")]
    declared = {_distribution(text) for texts in (project["dependencies"], *extras) for text in texts}
    provided = {
        "absl": "absl-py",
        "jaxlib": "jax",
        "orbax": "orbax-checkpoint",
        "PIL": "pillow",
        "markdown_it": "markdown-it-py",
        "starlette": "fastapi",
        "yaml": "pyyaml",
    }
    for path in SOURCES:
        if module_name(path).startswith(TRAINING):
            continue
        for target in imports(path):
            top = target.split(".")[0]
            if top and top != "lmdeploy_jax" and top not in sys.stdlib_module_names:
                assert provided.get(top, top.replace("_", "-")) in declared, f"{path} imports {top}"


# Releases before these have published holes that a file or a request from elsewhere reaches.
LEAST = {
    "aiohttp": "3.14.3",
    "h11": "0.16",
    "httptools": "0.6.3",
    "jinja2": "3.1.6",
    "orjson": "3.11.6",
    "pillow": "12.3",
    "sentencepiece": "0.2.3",
    "starlette": "1.3.1",
    "tqdm": "4.66.3",
}


def test_releases_with_published_holes_are_excluded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {_distribution(text): re.search(r">=([\d.]+)", text) for text in project["dependencies"]}
    for name, least in LEAST.items():
        found = bounds[name]
        assert found is not None, name
        assert _numbers(found[1]) >= _numbers(least), name


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _distribution(requirement: str) -> str:
    for mark in "[<>=!~; ":
        requirement = requirement.split(mark)[0]
    return requirement


def test_the_rules_can_be_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "lmdeploy_jax" / "text" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "import jax._src\nimport torch\nimport triton\nfrom ..engine import engine\nimport converters\n"
    )
    assert len(list(offences(bad))) >= 6
