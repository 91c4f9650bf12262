"""What an inference worker is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import generate_latest

from feature_store.config import HotHistoriesConfig, UserVectorsConfig
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_settings import RankingSettings
from model.storage import SnapshotRoot
from serving.access_config import AccessConfig
from serving.batcher import ModelThread
from serving.config import ServingConfig
from serving.guard_config import GuardConfig
from serving.vector_cache import UserVectorCache
from stream.clock import Clock
from stream.events import EventRules
from stream.log import EventLog


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingParts:
    """What an inference worker is made of."""

    config: ServingConfig
    model_config: ModelConfig
    model_name: str
    snapshot_root: SnapshotRoot
    log: EventLog
    store: FeatureStore
    hot_config: HotHistoriesConfig
    rules: EventRules
    clock: Clock
    guards: GuardConfig = field(default_factory=GuardConfig)
    """When to go back to the version before."""
    access: AccessConfig = field(default_factory=AccessConfig)
    """Who may use the API; by default everybody who can reach it."""
    snapshot_cache: Path | None = None
    """Folder for copies of the files of remote snapshots; None: they are read where they are."""
    ranking: RankingSettings = field(default_factory=RankingSettings)
    """How candidates are ranked; `model_config` is `with_ranking_head`."""
    vectors: UserVectorsConfig = field(default_factory=UserVectorsConfig)
    reads_vectors: bool = False
    """Whether users' vectors from upstream are looked for, where the ranking head reads them."""
    mode: str = "live"
    """`live`, or `replay`: then the time of a request is the event time that the stream has come to."""
    replica: str = "serving"
    """Name of this worker in the record of first answers; stable over restarts, different for every replica."""
    metrics_text: Callable[[], bytes] = generate_latest
    """What `/metrics` answers; by default the process's Prometheus registry."""

    def vector_cache(self, model_thread: ModelThread) -> UserVectorCache | None:
        """Users' vectors in memory; None where nobody reads them."""
        ranking = getattr(self.model_config, "ranking", None)
        if not self.reads_vectors or not isinstance(ranking, LlatteRankingConfig):
            return None
        return UserVectorCache(
            self.store, self.vectors, model_thread, self.clock, model=self.model_name, width=ranking.upstream_width
        )
