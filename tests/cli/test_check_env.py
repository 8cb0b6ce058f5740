"""`check_env`: reports what is there, and explains what is broken instead of breaking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lmdeploy_jax
from lmdeploy_jax.bench.quantised import FORMATS, FP8_BLOCKS
from lmdeploy_jax.cli import check_env, jax_probe, probes
from lmdeploy_jax.cli.main import main

ROOT = Path(lmdeploy_jax.__file__).parent.parent
H100 = "0, NVIDIA H100, 550.54.15, 81559 MiB, 4 MiB, 9.0"
H200 = "0, NVIDIA H200, 580.159, 143771 MiB, 4 MiB, 9.0"


def report(**changes: Any) -> dict[str, Any]:
    packages = dict.fromkeys(probes.PACKAGES, "1.2.3") | dict.fromkeys(check_env.PLUGINS, probes.MISSING)
    packages |= changes.pop("packages", {})
    sound = {"packages": packages, "settings": {}, "NVIDIA GPUs": [], "JAX": {"devices": ["cpu:0 cpu"]}}
    return sound | changes


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check_env", "--dump-file", str(tmp_path / "env.json")])
    text = capsys.readouterr().out
    dumped = json.loads((tmp_path / "env.json").read_text())
    assert dumped["lmdeploy_jax"] == lmdeploy_jax.__version__
    assert dumped["packages"]["jax"] in text
    assert dumped["JAX"]["devices"][0] in text
    assert dumped["JAX"]["kernel backends"]["xla"] == "usable"
    assert "GPU" in dumped["JAX"]["kernel backends"]["pallas"] or "usable" in text
    assert code == (1 if dumped["problems"] else 0)
    lines = check_env.yaml_lines(dumped, quote=True)
    assert yaml.safe_load("\n".join(lines)) == {key: value or "none" for key, value in dumped.items()} | {
        key: value for key, value in dumped.items() if value in ([], {})
    }


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "exit code"),
    ],
)
def test_a_broken_jax_is_described(tmp_path: Path, body: str, text: str) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-m", "lmdeploy_jax", "check_env"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    problems = done.stdout.split("problems:")[1]
    assert text in problems


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"packages": {"jax": probes.MISSING}}, "jax is not installed"),
        ({"packages": {"jax-cuda12-plugin": "0.9.9"}}, "jax-cuda12-plugin 0.9.9 does not fit jaxlib 1.2.3"),
        ({"NVIDIA GPUs": [H100]}, "lmdeploy_jax[cuda12]"),
        ({"NVIDIA GPUs": [H200]}, "lmdeploy_jax[cuda13]"),
        (
            {
                "packages": {"jax-cuda13-plugin": "1.2.3"},
                "NVIDIA GPUs": [H200],
                "JAX": {"devices": ["cpu:0 cpu"], "messages": ["RuntimeError: Unable to load cuPTI."]},
            },
            "Unable to load cuPTI",
        ),
        ({"settings": {"LMDEPLOY_USE_MODELSCOPE": "True"}}, "LMDEPLOY_USE_MODELSCOPE: LMDeploy's variables"),
        ({"JAX": "error: JAX ended with exit code -6"}, "exit code -6"),
        ({"JAX": {"devices": "error: RuntimeError: no device"}}, "no device"),
    ],
)
def test_problems_name_the_remedy(changes: dict[str, Any], text: str) -> None:
    found = list(check_env.problems(report(**changes)))
    assert len(found) == 1
    assert text in found[0]


def test_a_sound_installation_has_no_problems() -> None:
    assert list(check_env.problems(report())) == []
    seen = {"devices": ["gpu:0 NVIDIA H200"]}
    assert list(check_env.problems(report(**{"NVIDIA GPUs": [H200], "JAX": seen}))) == []


@pytest.mark.parametrize(
    ("kind", "measured", "platform", "capability", "told"),
    [
        ("w8a8_float8_e4m3fn", (), "gpu", 9.0, "fast: 8 bits times 8 bits by XLA"),
        ("w8a8_int8", ("w8a8_int8",), "gpu", 9.0, "fast: few rows by kernels"),
        ("w8a8_float8_e4m3fn", (), "gpu", 8.0, "slow: FP8 needs compute capability 8.9, this GPU has 8.0"),
        ("w4a16_g128", (), "gpu", 9.0, "slow: widened before each product; `bench tune"),
        ("w4a16_g128", ("w4a16_g128",), "gpu", 9.0, "fast: few rows by kernels"),
        ("w4a16_g128", (), "cpu", None, "widened to float32"),
    ],
)
def test_which_formats_are_fast_is_told(kind, measured, platform, capability, told):
    assert jax_probe.products_of(kind, measured, platform, capability).startswith(told)


@pytest.mark.parametrize(
    ("measured", "platform", "apart", "told"),
    [
        ("pallas", "gpu", None, "a kernel"),
        ("pallas", "gpu", "cuda:0 cannot", "XLA's: cuda:0 cannot"),
        ("pallas", "cpu", None, "XLA's: no kernel"),
        (None, "gpu", None, "XLA's: no kernel"),
    ],
)
def test_how_devices_add_up_is_told(measured, platform, apart, told):
    assert jax_probe.sums_of(measured, platform, apart).startswith(told)


def test_the_formats_are_named_as_their_times_are():
    """Those of dense products: MXFP4's are experts'."""
    names = {form.held(4096).name for name, form in FORMATS.items() if name != "mxfp4"}
    names.add(FP8_BLOCKS.held(4096).name)
    assert names <= set(jax_probe.QUANTISED.values())
