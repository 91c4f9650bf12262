"""What the modules of the command line share: the settings option, the store, a line on stderr."""

from __future__ import annotations

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
    """The settings in effect; raises SettingsError."""
    return load(config, environment=os.environ)


@contextmanager
def open_store(settings: Settings) -> Iterator[FeatureStore]:
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
    """One line to the person at the terminal, beside the output."""
    print(text, file=sys.stderr, flush=True)
