"""What the trainer is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from feature_store.config import HotHistoriesConfig
from feature_store.store import FeatureStore
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_settings import RankingSettings
from model.storage import SnapshotRoot
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.drift_config import DriftConfig
from online_trainer.learner_config import LearnerConfig
from online_trainer.vectors_as_of import VectorsAsOf
from stream.clock import Clock
from stream.events import EventRules
from stream.log import EventLog


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerParts:
    """Settings, and what the daemon is handed to work with."""

    config: TrainerConfig
    items_config: ItemsConfig
    model_config: ModelConfig
    loss_config: LossConfig
    optimizer_config: OptimizerConfig
    model_name: str
    log: EventLog
    store: FeatureStore
    hot_config: HotHistoriesConfig
    snapshot_root: SnapshotRoot
    checkpoint_root: Path
    quarantine_root: Path
    metrics_root: Path
    clock: Clock
    mode: str = "live"
    drift_config: DriftConfig = field(default_factory=DriftConfig)
    actions: tuple[str, ...] = EventRules().actions
    ranking: RankingSettings = field(default_factory=RankingSettings)
    """Of the ranking head; `model_config` is `with_ranking_head`."""
    reads_vectors: bool = False
    """Whether users' vectors are looked for, where the ranking head reads them."""

    def vectors(self) -> VectorsAsOf | None:
        """Where the ranking head's steps find users' vectors; None where none are looked for."""
        ranking = getattr(self.model_config, "ranking", None)
        if not self.reads_vectors or not isinstance(ranking, LlatteRankingConfig):
            return None
        return VectorsAsOf(self.store, model=self.model_name, width=ranking.upstream_width)

    def learner_config(self) -> LearnerConfig:
        """The part of the settings that decides what a step computes."""
        return LearnerConfig(
            trainer=self.config,
            items=self.items_config,
            model=self.model_config,
            loss=self.loss_config,
            optimizer=self.optimizer_config,
            drift=self.drift_config,
            actions=self.actions,
            ranking=self.ranking,
        )
