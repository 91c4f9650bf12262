"""The kill matrix names tests that exist, and has a row for every fail point."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from stream.failpoints import FAIL_POINTS

REPOSITORY = Path(__file__).parents[2]
MATRIX = (REPOSITORY / "docs" / "kill-matrix.md").read_text(encoding="utf-8")


def functions_in(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_named_in_the_kill_matrix_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", MATRIX)
    assert len(named) > 30
    assert not [f"{path}::{name}" for path, name in named if name not in functions_in(REPOSITORY / path)]


def test_every_fault_test_of_a_process_is_in_the_kill_matrix() -> None:
    faults = {
        name
        for path in (REPOSITORY / "tests" / "faults").glob("test_ingest_*.py")
        for name in functions_in(path)
        if name.startswith("test_")
    }
    assert len(faults) > 10
    assert not sorted(name for name in faults if f"::{name}`" not in MATRIX)


def test_every_fail_point_has_a_row() -> None:
    rows = [line for line in MATRIX.splitlines() if line.startswith("|")]
    assert not [point for point in FAIL_POINTS if not any(f"`{point}`" in row for row in rows)]
