"""Writes `headrace.toml` from the Config dataclasses: field docstrings become comments, defaults become values."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, Final

import msgspec

from ops.settings import SECTIONS, Section, is_secret, takes_file, variable_of

_WIDTH: Final = 118
_HEAD: Final = """\
# Settings of headrace. Every key is listed with its default; delete what you do not change.
# HEADRACE_TABLE__KEY in the environment overrides a key: HEADRACE_LOG__BOOTSTRAP_SERVERS=kafka:9092.
# `headrace config show` prints the effective settings and where each came from; unknown keys are refused.
# This file is written by `headrace config template`: change the docstrings and defaults in the code, not here.
"""


def template(sections: Sequence[Section] = SECTIONS) -> str:
    """The complete commented settings file, every value at its default."""
    return _HEAD + "".join(_table(section) for section in sections)


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass, whitespace folded; fields without one are absent."""
    module = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    body = next(node.body for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    docs: dict[str, str] = {}
    for statement, after in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[statement.target.id] = " ".join(after.value.value.split())
    return docs


def toml_value(value: Any) -> str:
    """A value in TOML's notation. Raises TypeError for what TOML cannot hold."""
    plain = msgspec.to_builtins(value, enc_hook=str)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, int):
        return f"{plain:_}" if abs(plain) >= 10_000 else str(plain)
    if isinstance(plain, float):
        return repr(plain)
    if isinstance(plain, str):
        return json.dumps(plain, ensure_ascii=False)
    if isinstance(plain, list | tuple):
        return f"[{', '.join(toml_value(item) for item in plain)}]"
    if isinstance(plain, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(item)}" for key, item in plain.items()) + "}"
    raise TypeError(f"TOML has no notation for {value!r}")


def _table(section: Section) -> str:
    table, kind = section.table, section.config_class()
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0]
    docs = field_docs(kind)
    lines = ["", "", _comment(" ".join(summary.split())), f"[{table}]"]
    for field in fields(kind):
        lines += ["", _comment(docs.get(field.name, ""))]
        default = section.default_of(field)
        assert default is not MISSING, f"{kind.__name__}.{field.name} needs a default"
        if is_secret(field.name):
            lines.append(f"# {field.name}: never here, but in {variable_of(table, field.name)} or in a file:")
            lines.append(f'# {field.name}_file = "/run/secrets/{field.name}"')
        elif default is None:
            lines.append(f"# {field.name} =   (not set)")
        else:
            lines.append(f"{field.name} = {toml_value(default)}")
        if takes_file(field.name) and not is_secret(field.name):
            lines.append(f'# {field.name}_file = "/run/secrets/{field.name}"   (when it holds a password)')
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2)) if text else "#"
