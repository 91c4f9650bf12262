"""Everything that decides what a training step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.ranker import content_dim_of
from model.ranking_settings import RankingSettings
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.drift_config import DriftConfig
from stream.events import EventRules


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerConfig:
    """Settings of a learner, checked against each other."""

    trainer: TrainerConfig
    items: ItemsConfig = field(default_factory=ItemsConfig)
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    drift: DriftConfig = field(default_factory=DriftConfig)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    """How the ranking head is trained; `model` is `with_ranking_head`."""
    actions: tuple[str, ...] = EventRules().actions
    """Names of the actions in order of their bits, as declared in events.actions."""

    def __post_init__(self) -> None:
        if content_dim_of(self.model) and not self.items.content_items:
            raise ValueError(
                "llatte.content is on and items.content_items is 0, so that nothing would be known about any item:"
                " raise items.content_items, or set llatte.content to false"
            )
        if self.model.max_items < 2 * self.trainer.batch_interactions_max:
            raise ValueError(
                f"model.max_items is {self.model.max_items}; the items of a step and as many new ones must find room:"
                f" at least twice trainer.batch_interactions or, under trainer.lag_policy larger_batches,"
                f" trainer.lag_batch_interactions ({self.trainer.batch_interactions_max})"
            )
