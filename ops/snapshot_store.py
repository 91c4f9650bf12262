"""The snapshot storage that the settings name."""

from __future__ import annotations

from model.storage import SnapshotStorage, open_storage
from ops.config import HeadraceConfig
from ops.errors import SettingsError
from ops.settings import Settings


def snapshot_storage(settings: Settings) -> SnapshotStorage:
    """The storage, not reached for yet; raises SettingsError for a URL that cannot be used on this machine."""
    try:
        return open_storage(settings.get(HeadraceConfig).snapshot_location)
    except ValueError as error:
        raise SettingsError(f"headrace.snapshot_root = {error}") from error
