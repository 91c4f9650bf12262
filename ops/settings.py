"""The one place where settings are read: `headrace.toml`, then the environment, into each room's frozen Config.

A table of the file maps onto a Config dataclass, a key onto a field; nothing is declared twice. Later sources win:
the field's default, the file, a file named by a `*_file` key, an environment variable. What no dataclass knows is
refused with the nearest name that exists. Secrets come from the environment or from `*_file` keys, never from
`headrace.toml` itself, so that it can be committed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from ops.errors import SettingsError

Config = TypeVar("Config")

DEFAULT_FILE: Final = "headrace.toml"
FILE_VARIABLE: Final = "HEADRACE_CONFIG"
PREFIX: Final = "HEADRACE_"
DEFAULT_ORIGIN: Final = "default"
_SECRET_SUFFIXES: Final = ("password", "passphrase", "secret", "token", "api_key")
_URL_PASSWORD: Final = re.compile(r"(?P<before>://[^:/@\s]*:)(?P<password>[^@/\s]+)(?=@)")


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the file and the dataclass it fills."""

    table: str
    module: str
    class_name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Defaults for fields that have none in the room, because only the installation knows (where the database is)."""

    def default_of(self, field: Field[Any]) -> Any:
        """The default of one of the dataclass's fields; MISSING when it has none."""
        if field.name in self.defaults:
            return self.defaults[field.name]
        return field.default if field.default_factory is MISSING else field.default_factory()

    def config_class(self) -> type[Any]:
        """The dataclass; imports its module."""
        found: type[Any] = getattr(importlib.import_module(self.module), self.class_name)
        return found


SECTIONS: Final = (
    Section("headrace", "ops.config", "HeadraceConfig"),
    Section("log", "stream.kafka", "KafkaConfig"),
    Section("events", "stream.events", "EventRules"),
    Section("ingest", "stream.ingest", "IngestConfig"),
    Section("labels", "stream.label_rules", "LabelConfig"),
    Section("store", "feature_store.config", "FeatureStoreConfig", {"url": "sqlite:///var/headrace.db"}),
    Section("hot", "feature_store.config", "HotHistoriesConfig"),
    Section("user_vectors", "feature_store.config", "UserVectorsConfig"),
    Section("model", "model.config", "ModelConfig"),
    Section("loss", "model.config", "LossConfig"),
    Section("optimizer", "model.config", "OptimizerConfig"),
    Section("ranking", "model.ranking_settings", "RankingSettings"),
    Section("llatte", "model.llatte_config", "LlatteSettings"),
    Section("upstream", "model.upstream_config", "UpstreamConfig"),
    Section("upstream_daemon", "online_trainer.upstream_settings", "UpstreamDaemonConfig"),
    Section("items", "online_trainer.config", "ItemsConfig"),
    Section("trainer", "online_trainer.config", "TrainerConfig"),
    Section("drift", "online_trainer.drift_config", "DriftConfig"),
    Section("serving", "serving.config", "ServingConfig"),
    Section("guards", "serving.guard_config", "GuardConfig"),
    Section("access", "serving.access_config", "AccessConfig"),
    Section("telemetry", "ops.telemetry_config", "TelemetryConfig"),
)
"""Every table of `headrace.toml`, in the order of the file."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting, as `headrace config show` prints it."""

    key: str
    """`table.field`."""

    value: Any
    """Plain JSON-like value; secrets are masked."""

    origin: str
    """`default`, the settings file, the file of a `*_file` key, or the environment variable."""


class Settings:
    """All settings of one process, read once."""

    def __init__(self, configs: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        self._configs = dict(configs)
        self._origins = dict(origins)

    def get(self, kind: type[Config]) -> Config:
        """The room's config by its class: `settings.get(KafkaConfig)`."""
        for config in self._configs.values():
            if type(config) is kind:
                return config
        raise AssertionError(f"{kind.__name__} fills no table of the settings")

    def origin(self, key: str) -> str:
        """Where the value of `table.field` came from."""
        return self._origins.get(key, DEFAULT_ORIGIN)

    def effective(self) -> list[Setting]:
        """Every setting with its value (secrets masked) and origin, in the order of the file."""
        return [
            Setting(key, masked(field.name, getattr(config, field.name)), self.origin(key))
            for table, config in self._configs.items()
            for field in fields(config)
            for key in (f"{table}.{field.name}",)
        ]


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that some source gives for a field."""

    value: Any
    origin: str
    is_text: bool
    """From the environment or a `*_file`: text that stands for a number, a flag or a list."""


def load(
    path: Path | None = None,
    *,
    environment: Mapping[str, str],
    sections: Sequence[Section] = SECTIONS,
) -> Settings:
    """Read the settings.

    `path`: the settings file; by default `$HEADRACE_CONFIG`, else `headrace.toml` in the current folder if it exists.
    Raises SettingsError for whatever is unknown, mistyped, out of range or unreadable.
    """
    file = _settings_file(path, environment)
    tables = _read_tables(file, [section.table for section in sections]) if file is not None else {}
    overrides = _overrides(environment, sections)
    configs: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for section in sections:
        kind = section.config_class()
        given = _given(section.table, kind, tables.get(section.table, {}), str(file), overrides)
        configs[section.table] = _build(section, kind, given)
        origins |= {f"{section.table}.{name}": one.origin for name, one in given.items()}
    _refuse_contradictions(configs)
    return Settings(configs, origins)


def _refuse_contradictions(configs: Mapping[str, Any]) -> None:
    """Refuse settings of different tables that cannot both be meant."""
    store, hot = configs.get("store"), configs.get("hot")
    if store is not None and hot is not None and 0 < store.max_history < hot.max_len:
        raise SettingsError(
            f"store.max_history = {store.max_history} is less than hot.max_len = {hot.max_len}: models would get less "
            f"history than they ask for; raise store.max_history (at best to {2 * hot.max_len}), or lower hot.max_len"
        )
    loss, events = configs.get("loss"), configs.get("events")
    if loss is not None and events is not None:
        unknown = sorted(loss.action_weights.keys() - set(events.actions))
        if unknown:
            raise SettingsError(
                f"loss.action_weights names {', '.join(unknown)}: declared in events.actions are "
                f"{', '.join(events.actions)}"
            )
    ranking = configs.get("ranking")
    if ranking is not None and events is not None:
        try:
            ranking.targets(events.actions)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    _refuse_surfaces(configs)
    _refuse_upstream(configs)
    trainer, serving = configs.get("trainer"), configs.get("serving")
    if trainer is not None and serving is not None and serving.lease_interval_ms * 2 > trainer.replica_timeout_s * 1000:
        raise SettingsError(
            f"serving.lease_interval_ms = {serving.lease_interval_ms} is over half of trainer.replica_timeout_s = "
            f"{trainer.replica_timeout_s:g}: the trainer would take live workers for gone; lower the first"
        )


def _refuse_surfaces(configs: Mapping[str, Any]) -> None:
    """Refuse to tell surfaces apart where histories keep none."""
    events = configs.get("events")
    if events is None or events.surface_key:
        return
    for table in ("model", "ranking"):
        if table in configs and configs[table].surfaces:
            raise SettingsError(
                f"{table}.surfaces is true and events.surface_key is not set, so that no surface would ever be told:"
                f" set events.surface_key and events.surfaces, or {table}.surfaces to false"
            )


def _refuse_upstream(configs: Mapping[str, Any]) -> None:
    """Refuse settings under which the upstream daemon could not work, or its readers would miss what they look for."""
    daemon, events, ranking = configs.get("upstream_daemon"), configs.get("events"), configs.get("ranking")
    if daemon is None or events is None:
        return
    try:
        daemon.action_mask(events.actions)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    upstream, items = configs.get("upstream"), configs.get("items")
    if upstream is not None and items is not None and upstream.content and not items.content_items:
        raise SettingsError(
            "upstream.content is on and items.content_items is 0, so that nothing would be known about any item: raise "
            "items.content_items, or set upstream.content to false"
        )
    if upstream is not None and upstream.max_items < 2 * daemon.learn_interactions:
        raise SettingsError(
            f"upstream.max_items = {upstream.max_items} is less than twice upstream_daemon.learn_interactions = "
            f"{daemon.learn_interactions}: the items of a step and as many new ones must find room; raise the first"
        )
    if not daemon.is_on:
        return
    if ranking is not None and ranking.kind != "llatte":
        raise SettingsError(
            f"upstream_daemon.is_on is true and ranking.kind = {ranking.kind!r}: nobody would read users' vectors; set "
            'ranking.kind = "llatte", or upstream_daemon.is_on = false'
        )
    labels, vectors = configs.get("labels"), configs.get("user_vectors")
    if labels is None or vectors is None or ranking is None or ranking.learn_from != "impressions":
        return
    needed_ms = labels.window_ms + labels.allowed_lateness_ms + labels.correction_ms
    if vectors.keep_ms < needed_ms:
        raise SettingsError(
            f"user_vectors.keep_ms = {vectors.keep_ms} is less than the {needed_ms} ms that a label may take "
            "(labels.window_ms, allowed_lateness_ms and correction_ms): training would not find the vectors that "
            "answers had; raise it"
        )


def variable_of(table: str, name: str) -> str:
    """The environment variable that overrides `table.name`."""
    return f"{PREFIX}{table}__{name}".upper()


def is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret."""
    return name.endswith(_SECRET_SUFFIXES)


def takes_file(name: str) -> bool:
    """Whether `<name>_file` may name a file that holds the value: secrets, and URLs, which can hold a password."""
    return is_secret(name) or name == "url" or name.endswith("_url")


def masked(name: str, value: Any) -> Any:
    """A value as it may be shown: plain types, secrets and passwords in URLs replaced by `***`."""
    if is_secret(name):
        return "***" if value else value
    if isinstance(value, str):
        return _URL_PASSWORD.sub(r"\g<before>***", value)
    return msgspec.to_builtins(value, enc_hook=str)


def _settings_file(path: Path | None, environment: Mapping[str, str]) -> Path | None:
    if path is None and FILE_VARIABLE in environment:
        path = Path(environment[FILE_VARIABLE])
    if path is None:
        return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None
    if not path.is_file():
        raise SettingsError(f"the settings file {path} does not exist; `headrace config template` prints one")
    return path


def _read_tables(file: Path, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings file {file} is not valid TOML: {error}") from error
    for name, table in content.items():
        if name not in known:
            raise SettingsError(f"{file}: unknown table [{name}]{_nearest(name, known)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{file}: {name} must be a table: [{name}]")
    return content


def _overrides(environment: Mapping[str, str], sections: Sequence[Section]) -> dict[tuple[str, str], tuple[str, str]]:
    """(table, key) → (value, variable) of every `HEADRACE_TABLE__KEY` in the environment."""
    tables = [section.table for section in sections]
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX):
            continue
        table, separator, key = variable.removeprefix(PREFIX).lower().partition("__")
        if separator:
            if table not in tables:
                raise SettingsError(
                    f"environment variable {variable}: there is no table [{table}]{_nearest(table, tables)}"
                )
            found[table, key] = (value, variable)
        elif table.split("_")[0] in tables and variable != FILE_VARIABLE:
            head, _, rest = table.partition("_")
            if rest in _field_names(sections, head):
                raise SettingsError(
                    f"environment variable {variable}: write it with two underscores, {variable_of(head, rest)}"
                )
    return found


def _field_names(sections: Sequence[Section], table: str) -> list[str]:
    return [field.name for section in sections if section.table == table for field in fields(section.config_class())]


def _given(
    table: str,
    kind: type[Any],
    in_file: Mapping[str, Any],
    file: str,
    overrides: Mapping[tuple[str, str], tuple[str, str]],
) -> dict[str, _Given]:
    """What file, `*_file` keys and environment give for one table; the last of them wins."""
    names = [field.name for field in fields(kind)]
    given: dict[str, _Given] = {}
    for key, value in in_file.items():
        origin = f"{file} [{table}]"
        name = _target(key, names)
        if name is None:
            raise SettingsError(f"{file}: unknown key {table}.{key}{_nearest(key, names)}")
        if name != key:
            given[name] = _from_file(f"{table}.{key}", value)
        else:
            _refuse_secret(table, key, value, file)
            given.setdefault(name, _Given(value, origin, is_text=False))
    from_environment = {key: one for (at, key), one in overrides.items() if at == table}
    # `*_file` variables first: a value given directly beats one given through a file.
    for key, (value, variable) in sorted(from_environment.items(), key=lambda item: item[0] in names):
        name = _target(key, names)
        if name is None:
            raise SettingsError(f"environment variable {variable}: unknown key {table}.{key}{_nearest(key, names)}")
        given[name] = _from_file(variable, value) if name != key else _Given(value, variable, is_text=True)
    return given


def _target(key: str, names: Sequence[str]) -> str | None:
    """The field that a key sets: itself, or for `password_file` the field `password`; None when unknown."""
    if key in names:
        return key
    name = key.removesuffix("_file")
    return name if name != key and name in names and takes_file(name) else None


def _from_file(key: str, path: Any) -> _Given:
    if not isinstance(path, str) or not path:
        raise SettingsError(f"{key} = {path!r}: must be the path of a file that holds the value")
    try:
        return _Given(Path(path).read_text(encoding="utf-8").strip(), f"file {path} ({key})", is_text=True)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{key} = {path}: the file cannot be read: {error}") from error


def _refuse_secret(table: str, name: str, value: Any, file: str) -> None:
    holds_password = isinstance(value, str) and _URL_PASSWORD.search(value) is not None
    if (is_secret(name) and value) or holds_password:
        raise SettingsError(
            f"{file}: {table}.{name} holds a secret, which does not belong in this file: "
            f"set {variable_of(table, name)}, or {table}.{name}_file to the path of a file that holds it"
        )


def _build(section: Section, kind: type[Any], given: Mapping[str, _Given]) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {name: _convert(f"{section.table}.{name}", one, hints[name]) for name, one in given.items()}
    try:
        return kind(**{**section.defaults, **values})
    except ValueError as error:
        text = str(error) if str(error).startswith(f"{section.table}.") else f"[{section.table}] {error}"
        origins = ", ".join(sorted({one.origin for one in given.values()}))
        text = _URL_PASSWORD.sub(r"\g<before>***", text)
        raise SettingsError(f"{text} (set in {origins})" if origins else text) from error


def _convert(key: str, given: _Given, hint: Any) -> Any:
    value = _parsed(given.value, hint) if given.is_text else given.value
    _refuse_unknown_inside(key, value, hint)
    try:
        converted = msgspec.convert(value, hint, strict=not given.is_text, dec_hook=_decode)
    except msgspec.ValidationError as error:
        shown = masked(key.rpartition(".")[2], given.value)
        raise SettingsError(f"{key} = {shown!r}: {error} (set in {given.origin})") from error
    numbers = converted.values() if isinstance(converted, dict) else converted
    for one in numbers if isinstance(numbers, Iterable) else [numbers]:
        # nan is not below, and not above, any limit that it could be held against.
        if isinstance(one, float) and not math.isfinite(one):
            raise SettingsError(f"{key} = {one}: must be a finite number (set in {given.origin})")
    return converted


def _refuse_unknown_inside(key: str, value: Any, hint: Any) -> None:
    """SettingsError for a key that the dataclass of a list's elements does not have: decoding would drop it."""
    elements = [one for one in typing.get_args(hint) if dataclasses.is_dataclass(one)]
    for table in value if elements and isinstance(value, list | tuple) else ():
        names = [field.name for field in fields(elements[0])]
        for name in table if isinstance(table, dict) else ():
            if name not in names:
                raise SettingsError(f"unknown key {key}[].{name}{_nearest(name, names)}")


def _parsed(text: str, hint: Any) -> Any:
    """Lists and tables of the environment: JSON, or items separated by commas or lines."""
    kinds = {typing.get_origin(one) or one for one in (hint, *typing.get_args(hint))}
    if kinds & {tuple, list, set, frozenset, dict}:
        if text.lstrip().startswith(("[", "{")):
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                return text  # refused with the expected type
        return [item.strip() for item in re.split(r"[,\n]", text) if item.strip()]
    return text


def _decode(kind: type[Any], value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"settings cannot hold a {kind}")


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else f"; known are {', '.join(known)}"
