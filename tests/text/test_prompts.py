"""Every form of prompt, and what is said about the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmdeploy_jax.text
from lmdeploy_jax.errors import RequestError
from lmdeploy_jax.text.prompts import Prompt, normalise_prompts

HI = {"role": "user", "content": "hi"}
YO = {"role": "user", "content": "yo"}
IMAGE = np.zeros((1, 1, 3), np.uint8)


@pytest.mark.parametrize(
    ("prompts", "expected", "single"),
    [
        ("hi", [Prompt(text="hi")], True),
        (["hi"], [Prompt(text="hi")], False),
        (["hi", "yo"], [Prompt(text="hi"), Prompt(text="yo")], False),
        (HI, [Prompt(messages=(HI,))], True),
        ([HI, YO], [Prompt(messages=(HI, YO))], True),
        ([[HI], [YO]], [Prompt(messages=(HI,)), Prompt(messages=(YO,))], False),
        ([1, np.int32(2)], [Prompt(token_ids=(1, 2))], True),
        ([[1], [2, 3]], [Prompt(token_ids=(1,)), Prompt(token_ids=(2, 3))], False),
        (["hi", [HI], [4]], [Prompt(text="hi"), Prompt(messages=(HI,)), Prompt(token_ids=(4,))], False),
        ([], [], False),
        (("hi", []), [Prompt(messages=(HI,))], True),
    ],
)
def test_forms(prompts: Any, expected: list[Prompt], single: bool) -> None:
    assert normalise_prompts(prompts) == (expected, single)


@pytest.mark.parametrize(
    "prompts",
    [
        ("hi", IMAGE),
        (IMAGE, "hi"),
        ("hi", "https://x/y.png"),
        ("hi", [IMAGE]),
        [("hi", "data:image/png;base64,")],
        ("http://x is what?", Path("x.png")),
    ],
)
def test_images_are_refused(prompts: Any) -> None:
    (error,), _ = normalise_prompts(prompts)
    assert isinstance(error, RequestError)
    assert "Images are not supported" in str(error)


@pytest.mark.parametrize(
    "prompts", [3, None, ("a", "b"), ("a",), [None], [[]], [["a", HI]], [True], b"x", {1, 2}]
)
def test_other_forms_are_refused(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"Unsupported prompts: .* Only support str, openai message format"):
        normalise_prompts(prompts)


def test_malformed_messages_are_named() -> None:
    bad = [{"role": "x", "content": ""}]
    (error,), single = normalise_prompts(bad)
    assert (type(error), single) == (RequestError, True)
    assert "unknown role 'x'" in str(error)
    first, second, third = normalise_prompts(["hi", bad, [1, 2]])[0]
    assert (first, str(second), third) == (Prompt(text="hi"), str(error), Prompt(token_ids=(1, 2)))


def test_text_is_light() -> None:
    """No jax, no transformers; sentencepiece only for checkpoints that need it."""
    package = str(Path(lmdeploy_jax.text.__file__).parents[1])
    code = (
        "import sys, types\n"
        "sys.modules['lmdeploy_jax'] = package = types.ModuleType('lmdeploy_jax')\n"
        f"package.__path__ = [{package!r}]\n"  # without what the package itself imports
        "import lmdeploy_jax.text.chat_template, lmdeploy_jax.text.prompts, lmdeploy_jax.text.stop\n"
        "print([m for m in ('jax', 'numpy', 'transformers', 'torch', 'sentencepiece') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_text_imports_no_jax() -> None:
    """But for the one module that is there to ask transformers."""
    for path in Path(lmdeploy_jax.text.__file__).parent.glob("*.py"):
        unwanted = {"jax", "jaxlib", "flax"} | ({"transformers"} - {path.stem.removesuffix("_backend")})
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in unwanted], path
