"""Settings: one file, environment overrides, nothing unknown, no secret in the file, an origin for every value."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from model.config import ModelConfig
from ops.errors import SettingsError
from ops.settings import SECTIONS as REAL_SECTIONS
from ops.settings import Section, Setting, Settings, is_secret, load


@dataclass(frozen=True, kw_only=True, slots=True)
class PumpConfig:
    """A pump."""

    rate: float = 0.5
    """Litres a second."""

    mode: Literal["slow", "fast"] = "slow"
    """How it runs."""

    valves: tuple[str, ...] = ("a", "b")
    """Names of the valves."""

    limit: int | None = None
    """Litres; none without."""

    folder: Path = Path("var")
    """Where its log goes."""

    is_loud: bool = False
    """Whether it may be heard."""

    password: str = ""
    """Opens the lid."""

    url: str = "sqlite:///pump.db"
    """Where it stores."""

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"pump.rate = {self.rate}: must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class TankConfig:
    """A tank."""

    volume: int = 10
    """Litres."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WellConfig:
    """A well."""

    depth: int
    """Metres; only the installation knows."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth} in postgresql://me:sesame@db/x")


SECTIONS = (
    Section("pump", __name__, "PumpConfig"),
    Section("tank", __name__, "TankConfig"),
    Section("well", __name__, "WellConfig", {"depth": 7}),
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from this repository's own headrace.toml."""
    monkeypatch.chdir(tmp_path)


def _load(tmp_path: Path, text: str = "", **environment: str) -> Settings:
    path = tmp_path / "headrace.toml"
    path.write_text(text)
    return load(path, environment=environment, sections=SECTIONS)


def test_neither_settings_nor_ingest_need_torch() -> None:
    # 1.4 s of every command, and 180 MB of an ingest process.
    code = (
        "import sys; from ops.command_line import settings_of; settings_of(None); import ops.daemons, stream.app; "
        "sys.exit(', '.join({'torch', 'matplotlib', 'polars', 'river'} & set(sys.modules)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr


def test_without_file_and_environment_everything_is_at_its_default() -> None:
    settings = load(environment={}, sections=SECTIONS)
    assert settings.get(PumpConfig) == PumpConfig()
    assert settings.get(TankConfig) == TankConfig()
    assert {one.origin for one in settings.effective()} == {"default"}


def test_the_file_in_the_current_folder_is_read_without_being_named(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("[tank]\nvolume = 11\n")
    assert load(environment={}, sections=SECTIONS).get(TankConfig).volume == 11


def test_the_file_named_by_the_environment_is_read(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[tank]\nvolume = 12\n")
    environment = {"HEADRACE_CONFIG": str(tmp_path / "other.toml")}
    assert load(environment=environment, sections=SECTIONS).get(TankConfig).volume == 12


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    settings = _load(tmp_path, "[pump]\nrate = 2\nmode = 'fast'\n", HEADRACE_PUMP__RATE="3.5")
    assert settings.get(PumpConfig) == PumpConfig(rate=3.5, mode="fast")
    assert settings.origin("pump.rate") == "HEADRACE_PUMP__RATE"
    assert settings.origin("pump.mode") == f"{tmp_path / 'headrace.toml'} [pump]"
    assert settings.origin("pump.valves") == "default"


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("HEADRACE_PUMP__IS_LOUD", "true", "is_loud", True),
        ("HEADRACE_PUMP__IS_LOUD", "0", "is_loud", False),
        ("HEADRACE_PUMP__LIMIT", "7", "limit", 7),
        ("HEADRACE_PUMP__LIMIT", "null", "limit", None),
        ("HEADRACE_PUMP__VALVES", "x, y,z", "valves", ("x", "y", "z")),
        ("HEADRACE_PUMP__VALVES", '["x,1", "y"]', "valves", ("x,1", "y")),
        ("HEADRACE_PUMP__FOLDER", "/srv/pump", "folder", Path("/srv/pump")),
        ("HEADRACE_PUMP__URL", "123", "url", "123"),
    ],
)
def test_text_of_the_environment_becomes_the_type_of_the_field(
    tmp_path: Path, variable: str, text: str, name: str, value: object
) -> None:
    assert getattr(_load(tmp_path, **{variable: text}).get(PumpConfig), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pump]\nrat = 1\n", "unknown key pump.rat; did you mean rate?"),
        ("[pump]\nxyzzy = 1\n", "unknown key pump.xyzzy; known are rate, mode"),
        ("[pumps]\n", r"unknown table \[pumps\]; did you mean pump?"),
        ("pump = 3\n", r"pump must be a table: \[pump\]"),
        ("[pump\n", "is not valid TOML: .*line 1"),
        (
            "[pump]\nrate = 'much'\n",
            r"pump.rate = 'much': Expected `float`, got `str` \(set in .*headrace.toml \[pump\]\)",
        ),
        ("[pump]\nrate = true\n", "pump.rate = True: Expected `float`, got `bool`"),
        ("[pump]\nmode = 'medium'\n", "pump.mode = 'medium': Invalid enum value 'medium'"),
        ("[tank]\nvolume = '11'\n", "tank.volume = '11': Expected `int`, got `str`"),
        ("[pump]\nrate = -1.0\n", r"pump.rate = -1.0: must be positive \(set in .*headrace.toml \[pump\]\)"),
        ("[pump]\nrate = nan\n", r"pump.rate = nan: must be a finite number \(set in .*headrace.toml \[pump\]\)"),
        ("[tank]\nvolume_file = 'x'\n", "unknown key tank.volume_file; did you mean volume?"),
    ],
)
def test_what_the_file_must_not_hold_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        _load(tmp_path, text)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "HEADRACE_PUMP__RAT",
            "1",
            "environment variable HEADRACE_PUMP__RAT: unknown key pump.rat; did you mean rate?",
        ),
        ("HEADRACE_PUMPP__RATE", "1", r"HEADRACE_PUMPP__RATE: there is no table \[pumpp\]; did you mean pump?"),
        ("HEADRACE_PUMP_RATE", "1", "HEADRACE_PUMP_RATE: write it with two underscores, HEADRACE_PUMP__RATE"),
        (
            "HEADRACE_TANK__VOLUME",
            "ten",
            r"tank.volume = 'ten': Expected `int`, got `str` \(set in HEADRACE_TANK__VOLUME\)",
        ),
        ("HEADRACE_PUMP__RATE", "-1", r"pump.rate = -1.0: must be positive \(set in HEADRACE_PUMP__RATE\)"),
        ("HEADRACE_PUMP__RATE", "inf", r"pump.rate = inf: must be a finite number \(set in HEADRACE_PUMP__RATE\)"),
        ("HEADRACE_PUMP__VALVES", "[1, 2", "pump.valves = '.1, 2': Expected `array`, got `str`"),
        ("HEADRACE_CONFIG", "/nowhere.toml", "the settings file /nowhere.toml does not exist"),
    ],
)
def test_what_the_environment_must_not_hold_is_refused_by_name(variable: str, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(environment={variable: text}, sections=SECTIONS)


def test_a_field_without_a_default_takes_that_of_the_installation(tmp_path: Path) -> None:
    assert _load(tmp_path).get(WellConfig).depth == 7
    assert _load(tmp_path, "[well]\ndepth = 8\n").get(WellConfig).depth == 8


def test_a_limit_that_does_not_name_its_table_is_reported_with_it_and_without_passwords() -> None:
    with pytest.raises(SettingsError, match=r"^\[well\] depth is 0 in postgresql://me:\*\*\*@db/x \(set in HEADRACE_"):
        load(environment={"HEADRACE_WELL__DEPTH": "0"}, sections=SECTIONS)


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path) -> None:
    settings = _load(tmp_path, HEADRACE_FAIL_POINT="x", HEADRACE_TANSU_BIN="y", PATH="z")
    assert settings.get(PumpConfig) == PumpConfig()


def test_a_secret_in_the_file_is_refused_and_told_where_to_go(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"pump.password holds a secret.*HEADRACE_PUMP__PASSWORD, or pump.password_file"
    ):
        _load(tmp_path, "[pump]\npassword = 'sesame'\n")


def test_a_password_inside_a_url_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="pump.url holds a secret") as refusal:
        _load(tmp_path, "[pump]\nurl = 'postgresql+psycopg://me:sesame@db/headrace'\n")
    assert "sesame" not in str(refusal.value)
    text = "[pump]\nurl = 'postgresql+psycopg://me@db/headrace'\n"
    assert _load(tmp_path, text).get(PumpConfig).url == "postgresql+psycopg://me@db/headrace"


def test_a_secret_is_read_from_the_file_that_a_file_key_names(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sesame\n")
    settings = _load(tmp_path, f"[pump]\npassword_file = '{tmp_path / 'secret'}'\n")
    assert settings.get(PumpConfig).password == "sesame"
    assert settings.origin("pump.password") == f"file {tmp_path / 'secret'} (pump.password_file)"
    environment = {"HEADRACE_PUMP__PASSWORD_FILE": str(tmp_path / "secret"), "HEADRACE_PUMP__PASSWORD": "direct"}
    assert _load(tmp_path, **environment).get(PumpConfig).password == "direct"


def test_a_secret_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"pump.password_file = /nowhere: the file cannot be read"):
        _load(tmp_path, "[pump]\npassword_file = '/nowhere'\n")


def test_secrets_are_masked_wherever_settings_are_shown(tmp_path: Path) -> None:
    settings = _load(
        tmp_path, HEADRACE_PUMP__PASSWORD="sesame", HEADRACE_PUMP__URL="postgresql+psycopg://me:sesame@db/headrace"
    )
    assert settings.get(PumpConfig).password == "sesame"
    shown = {one.key: one for one in settings.effective()}
    assert shown["pump.password"] == Setting("pump.password", "***", "HEADRACE_PUMP__PASSWORD")
    assert shown["pump.url"].value == "postgresql+psycopg://me:***@db/headrace"
    assert "sesame" not in repr(settings.effective())


def test_less_history_kept_than_models_are_given_is_refused() -> None:
    with pytest.raises(SettingsError, match="store.max_history = 100 is less than hot.max_len = 512"):
        load(environment={"HEADRACE_STORE__MAX_HISTORY": "100"})
    load(environment={"HEADRACE_STORE__MAX_HISTORY": "512"})
    load(environment={"HEADRACE_STORE__MAX_HISTORY": "0"})


@pytest.mark.parametrize("table", ["MODEL", "RANKING"])
def test_telling_surfaces_apart_that_histories_do_not_keep_is_refused(table: str) -> None:
    told = {f"HEADRACE_{table}__SURFACES": "true", "HEADRACE_MODEL__TOKENS": "merged"}
    with pytest.raises(SettingsError, match=rf"{table.lower()}\.surfaces is true and events\.surface_key is not set"):
        load(environment=told)
    load(environment=told | {"HEADRACE_EVENTS__SURFACE_KEY": "page", "HEADRACE_EVENTS__SURFACES": '["home"]'})


def test_an_upstream_daemon_that_nobody_would_read_or_whose_vectors_go_too_soon_is_refused() -> None:
    is_on = {"HEADRACE_UPSTREAM_DAEMON__IS_ON": "true", "HEADRACE_RANKING__TASKS": '["rating"]'}
    with pytest.raises(SettingsError, match=r"upstream_daemon\.is_on is true and ranking\.kind = 'hstu'"):
        load(environment=is_on)
    llatte = is_on | {"HEADRACE_RANKING__KIND": "llatte"}
    load(environment=llatte)
    with pytest.raises(SettingsError, match=r"user_vectors\.keep_ms = 1000 is less than the 23700000 ms that a label"):
        load(environment=llatte | {"HEADRACE_USER_VECTORS__KEEP_MS": "1000"})
    with pytest.raises(SettingsError, match=r"upstream_daemon\.actions names buy: declared in events\.actions are "):
        load(environment={"HEADRACE_UPSTREAM_DAEMON__ACTIONS": '["buy"]'})
    with pytest.raises(SettingsError, match=r"upstream\.max_items = 255 is less than twice upstream_daemon\.learn_int"):
        load(environment={"HEADRACE_UPSTREAM__MAX_ITEMS": "255"})


def test_only_text_is_a_secret() -> None:
    secret = [
        f"{section.table}.{field.name}"
        for section in REAL_SECTIONS
        for field in dataclasses.fields(section.config_class())
        if is_secret(field.name) and "str" not in str(field.type)
    ]
    assert secret == []


def test_tables_in_a_list_are_read_and_what_they_do_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "headrace.toml"
    path.write_text('[model]\ntransducers = [{name = "views", actions = ["view"], max_len = 8}]\n')
    (views,) = load(path, environment={}).get(ModelConfig).transducers
    assert (views.name, views.actions, views.max_len, views.num_layers) == ("views", ("view",), 8, None)
    variable = {"HEADRACE_MODEL__TRANSDUCERS": '[{"name": "deeds", "actions": ["like"]}]'}
    assert [one.name for one in load(path, environment=variable).get(ModelConfig).transducers] == ["deeds"]
    path.write_text('[model]\ntransducers = [{name = "views", actions = ["view"], max_length = 8}]\n')
    with pytest.raises(SettingsError, match=r"unknown key model.transducers\[\].max_length; did you mean max_len\?"):
        load(path, environment={})
