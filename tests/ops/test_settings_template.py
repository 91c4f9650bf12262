"""`headrace.toml` is generated from the Config dataclasses, reads back as their defaults, and explains every key."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from ops.settings import SECTIONS, Section, load, masked
from ops.settings_template import field_docs, template, toml_value

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """A gate."""

    width: float = 0.001
    """Metres.
    Narrow."""

    count: int = 65_536
    """Bars."""

    colour: str | None = None
    """None: bare."""

    token: str = ""
    """Opens it."""

    url: str = "sqlite://"
    """Where."""

    undocumented: int = 1


GATE = (Section("gate", __name__, "GateConfig"),)


def test_a_key_carries_its_docstring_and_default() -> None:
    text = template(GATE)
    assert "# A gate.\n[gate]\n" in text
    assert "\n# Metres. Narrow.\nwidth = 0.001\n" in text
    assert "\ncount = 65_536\n" in text
    assert "\n# None: bare.\n# colour =   (not set)\n" in text


def test_a_secret_is_never_given_a_place_for_its_value() -> None:
    text = template(GATE)
    assert "\n# token: never here, but in HEADRACE_GATE__TOKEN or in a file:\n" in text
    assert not any(line.startswith("token") for line in text.splitlines())


def test_a_template_reads_back_as_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text(template(GATE))
    assert load(path, environment={}, sections=GATE).get(GateConfig) == GateConfig()


def test_docstrings_under_fields_are_found() -> None:
    docs = field_docs(GateConfig)
    assert docs["width"] == "Metres. Narrow."
    assert "undocumented" not in docs


@pytest.mark.parametrize(
    "value",
    [True, 0, 12_345_678, -0.5, 1e-9, 1e20, 'a "quoted" \\ line\nbreak é', ("a", "b"), [], {"a": 1, "b c": [2]}],
)
def test_values_survive_toml_notation(value: object) -> None:
    read = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert read == (list(value) if isinstance(value, tuple) else value)


@pytest.fixture(params=SECTIONS, ids=lambda section: section.table)
def section(request: pytest.FixtureRequest) -> Section:
    found: Section = request.param
    return found


def test_every_key_says_its_reason(section: Section) -> None:
    kind = section.config_class()
    silent = [field.name for field in fields(kind) if not field_docs(kind).get(field.name)]
    assert not silent, f"{kind.__module__}.{kind.__name__}: no docstring under {silent}"


def test_every_config_is_frozen_and_complete_without_arguments(section: Section) -> None:
    kind = section.config_class()
    assert kind.__dataclass_params__.frozen
    assert kind(**section.defaults) == kind(**section.defaults)


def test_the_file_of_the_repository_is_what_the_code_says() -> None:
    assert (REPOSITORY / "headrace.toml").read_text(encoding="utf-8") == template(), (
        "run: .venv/bin/headrace config template > headrace.toml"
    )


def test_the_file_of_the_repository_reads_back_as_the_defaults() -> None:
    settings = load(REPOSITORY / "headrace.toml", environment={})
    expected = {
        f"{section.table}.{field.name}": masked(field.name, section.default_of(field))
        for section in SECTIONS
        for field in fields(section.config_class())
    }
    assert {one.key: one.value for one in settings.effective()} == expected
