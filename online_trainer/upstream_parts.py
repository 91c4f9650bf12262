"""What the upstream daemon is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from feature_store.config import UserVectorsConfig
from feature_store.store import FeatureStore
from model.ranking_settings import RankingSettings
from model.storage import SnapshotRoot
from model.upstream_config import UpstreamModelConfig
from online_trainer.config import ItemsConfig
from online_trainer.upstream_settings import UpstreamDaemonConfig
from stream.clock import Clock
from stream.events import EventRules
from stream.log import EventLog


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamParts:
    """Settings, and what the daemon is handed to work with."""

    config: UpstreamDaemonConfig
    model_config: UpstreamModelConfig
    model_name: str
    """Of the model that is served."""
    log: EventLog
    store: FeatureStore
    snapshot_root: SnapshotRoot
    checkpoint_root: Path
    clock: Clock
    mode: str = "live"
    actions: tuple[str, ...] = EventRules().actions
    vectors: UserVectorsConfig = field(default_factory=UserVectorsConfig)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    """What the tasks are learned from, and how labels are read."""
    items: ItemsConfig = field(default_factory=ItemsConfig)
    """How content is read, where the model reads it."""
