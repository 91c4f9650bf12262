"""The documentation is tested: what exists is written down, and what is written down exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer

from ops.cli import app
from ops.settings import SECTIONS
from stream.messages import Topics

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
ROOMS = ("backtest", "feature_store", "kernels", "model", "online_trainer", "ops", "serving", "stream")


@cache
def _calls() -> list[ast.Call]:
    paths = (path for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in paths)
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _texts_given_to(names: re.Pattern[str]) -> set[str]:
    """The first argument, where it is a text, of every call whose attribute name matches."""
    return {
        call.args[0].value
        for call in _calls()
        if isinstance(call.func, ast.Attribute)
        and names.fullmatch(call.func.attr)
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def _commands(group: typer.Typer, prefix: str = "headrace") -> Iterator[str]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{prefix} {command.name or command.callback.__name__}"
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _commands(inner.typer_instance, f"{prefix} {inner.name}")


def _settings() -> set[str]:
    return {f"{section.table}.{field.name}" for section in SECTIONS for field in fields(section.config_class())}


def test_there_is_documentation() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= {page.name for page in PAGES}
    assert (REPOSITORY / "docs" / "architecture.md").is_file()


def test_every_command_is_documented() -> None:
    assert not [command for command in _commands(app) if command not in TEXT]


def test_every_topic_is_documented() -> None:
    assert not [field.name for field in fields(Topics) if f"`{getattr(Topics(), field.name)}`" not in TEXT]


def test_every_instrument_is_documented() -> None:
    instruments = _texts_given_to(re.compile(r"create_\w*(counter|gauge|histogram)"))
    assert instruments
    assert not sorted(name for name in instruments if name not in TEXT)


def test_every_instrument_carries_our_name_or_the_one_that_opentelemetry_gives_it() -> None:
    instruments = _texts_given_to(re.compile(r"create_\w*(counter|gauge|histogram)"))
    assert {name for name in instruments if not name.startswith("headrace.")} == {
        "db.client.operation.duration",
        "http.server.request.duration",
        "messaging.client.consumed.messages",
        "messaging.client.sent.messages",
        "messaging.process.duration",
    }


def test_every_route_is_documented() -> None:
    texts = _texts_given_to(re.compile(r"get|post|delete|put"))
    routes = {text.replace(":path}", "}") for text in texts if text.startswith("/")}
    assert "/v1/recommend" in routes
    assert not sorted(route for route in routes if route not in TEXT)


def test_every_setting_is_in_the_file_that_explains_it() -> None:
    explained: set[str] = set()
    table = ""
    for line in (REPOSITORY / "headrace.toml").read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            table = header[1]
        elif key := re.match(r"(?:# )?(\w+)(?: =|: never here)", line):
            explained.add(f"{table}.{key[1]}")
    assert _settings() <= explained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_settings_named_in_the_documentation_exist() -> None:
    tables = "|".join(section.table for section in SECTIONS)
    files = {path.name for room in ROOMS for path in (REPOSITORY / room).rglob("*.py")}
    named = {
        key
        for key in re.findall(rf"`((?:{tables})\.[a-z_0-9]+)`", TEXT)
        # `model.snapshot` or `serving.config` name modules.
        if f"{key.partition('.')[2]}.py" not in files and not (REPOSITORY / key.replace(".", "/")).is_dir()
    }
    allowed = _settings() | {f"{key}_file" for key in _settings()} | {"headrace.toml"}
    # Instruments and attributes of telemetry share the prefix of the table [headrace].
    sources = "".join(path.read_text(encoding="utf-8") for room in ROOMS for path in (REPOSITORY / room).rglob("*.py"))
    assert not sorted(name for name in named - allowed if f'"{name}"' not in sources)


def test_variables_named_in_the_documentation_exist() -> None:
    named = set(re.findall(r"\bHEADRACE_[A-Z0-9]+(?:_[A-Z0-9]+)*__[A-Z0-9_]+\b", TEXT))
    settings = {f"HEADRACE_{key.replace('.', '__')}".upper() for key in _settings()}
    assert not sorted(named - settings - {f"{name}_FILE" for name in settings} - {"HEADRACE_TABLE__KEY"})


def test_make_targets_named_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z0-9-]+)", TEXT)) | set(
        re.findall(r"^\s*(?:\$ )?make ([a-z0-9-]+)", TEXT, re.MULTILINE)
    )
    assert not sorted(named - targets)
