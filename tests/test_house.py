"""The package stays small enough to read: its size, and that of its files and functions."""

from __future__ import annotations

import ast
import statistics

from tests.test_imports import SOURCES

MOST_LINES, MOST_IN_A_FILE = 66_000, 400


def test_the_package_stays_small() -> None:
    lines = {path: path.read_text().count("\n") for path in SOURCES}
    print(f"{sum(lines.values())} lines in {len(lines)} files")
    assert sum(lines.values()) <= MOST_LINES
    assert {path: count for path, count in lines.items() if count > MOST_IN_A_FILE} == {}


def test_functions_stay_short() -> None:
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = sorted((node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, functions))
    assert statistics.median(sizes) <= 7
    assert sizes[len(sizes) * 9 // 10] <= 18
