"""Rules about the source that no other tool checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOMS = (
    "backtest",
    "feature_store",
    "kernels",
    "migrations",
    "model",
    "online_trainer",
    "ops",
    "serving",
    "stream",
)


@cache
def _parsed(folder: str) -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(REPOSITORY)), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]


def _sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        yield from _parsed(folder)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _importing(prefixes: tuple[str, ...], *folders: str) -> set[str]:
    return {
        path
        for path, tree in _sources(*folders)
        for name in _imported(tree)
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
    }


def _calling(names: set[str], *folders: str) -> set[str]:
    return {
        path
        for path, tree in _sources(*folders)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    }


def test_only_ops_telemetry_touches_the_opentelemetry_sdk() -> None:
    users = _importing(("opentelemetry.sdk", "opentelemetry.exporter"), *ROOMS)
    assert users == {"ops/telemetry.py"}


def test_nothing_but_the_clock_reads_the_wall_clock() -> None:
    wall_clock = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    assert _calling(wall_clock, *ROOMS) == {"stream/clock.py"}


def test_nothing_is_pickled() -> None:
    everything = (*ROOMS, "benchmarks", "tests")
    assert not _importing(("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"), *everything)
    # Formats that are pickle inside: whoever can write such a file runs code in whoever reads it.
    assert not _calling({"torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"}, *everything)
    trusting = {
        path
        for path, tree in _sources(*everything)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    }
    assert not trusting


def test_no_file_so_much_as_mentions_pickle_but_to_rule_it_out() -> None:
    mentions = {
        str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8").lower().count("pickle")
        for folder in (*ROOMS, "benchmarks")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert not {path for path, count in mentions.items() if count}


def test_tests_use_fakes_not_mocks() -> None:
    assert not _importing(("unittest.mock", "mock", "pytest_mock"), "tests")


def test_test_folders_mirror_the_rooms() -> None:
    allowed = {*ROOMS, "benchmarks", "docs", "contracts", "faults", "whole"}
    folders = {
        path.parent.relative_to(REPOSITORY / "tests").parts[0] for path in REPOSITORY.glob("tests/*/**/test_*.py")
    }
    assert folders <= allowed
    assert not list(REPOSITORY.glob("tests/**/__init__.py"))


def test_every_room_says_what_it_is_for() -> None:
    silent = [
        path
        for path, tree in _sources(*ROOMS)
        if path.endswith("__init__.py") and not path.startswith("migrations/versions") and not ast.get_docstring(tree)
    ]
    assert not silent
