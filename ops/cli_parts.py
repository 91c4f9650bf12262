"""What the modules of the command line share: the option for the settings file, opening settings and store."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.settings import Settings, load

if TYPE_CHECKING:
    from feature_store.store import FeatureStore

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file; by default $HEADRACE_CONFIG, else ./headrace.toml if it exists."),
]


def settings_of(config: Path | None) -> Settings:
    """The settings that a command runs with. Raises SettingsError."""
    return load(config, environment=os.environ)


@contextmanager
def opened_store(settings: Settings) -> Iterator["FeatureStore"]:
    """The feature store, if its schema is this version's."""
    from feature_store.config import FeatureStoreConfig
    from feature_store.store import FeatureStore

    store = FeatureStore(settings.get(FeatureStoreConfig))
    try:
        store.require_current_schema()
        yield store
    finally:
        store.close()


def say(text: str) -> None:
    """Tell the person at the terminal; stdout stays for results."""
    print(text, file=sys.stderr, flush=True)
