"""The models that settings of a ranking head ask for: the one it is part of, and the user model upstream of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from model.action_encoder import STORED_ACTIONS
from model.action_heads import ActionTask
from model.config import ModelConfig
from model.llatte_config import LlatteSettings
from model.llatte_ranking_config import LlatteRankingConfig
from model.ranking_network import RankingConfig, RankingModelConfig
from model.ranking_settings import RankingSettings
from model.transducers import with_action_bits
from model.upstream_config import UpstreamConfig, UpstreamModelConfig


def with_ranking_head(
    model: ModelConfig,
    settings: RankingSettings,
    actions: Sequence[str],
    llatte: LlatteSettings | None = None,
    *,
    upstream_width: int = UpstreamConfig().width,
) -> ModelConfig:
    """The model with the head that the settings describe, if they do, its transducers with the bits of their actions.

    actions: as declared, in order of their bits. llatte, upstream_width: of the ranker if it is LLaTTE's, None: by
    default. ValueError as `RankingSettings.targets`, and for an encoder that cannot rank.
    """
    model = with_action_bits(model, actions)
    if not settings.tasks:
        return model
    ranking: RankingConfig | LlatteRankingConfig
    if settings.kind == "llatte":
        ranking = LlatteRankingConfig(
            tasks=action_tasks(settings, actions),
            num_actions=STORED_ACTIONS,
            llatte=LlatteSettings() if llatte is None else llatte,
            upstream_width=upstream_width,
            value_thresholds=settings.value_thresholds,
            surfaces=settings.surfaces,
            task_hidden_dim=settings.task_hidden_dim,
            max_candidates=settings.max_candidates,
        )
        return _with(model, ranking)
    ranking = RankingConfig(
        tasks=action_tasks(settings, actions),
        num_actions=STORED_ACTIONS,
        tokens=settings.tokens,
        value_thresholds=settings.value_thresholds,
        surfaces=settings.surfaces,
        task_hidden_dim=settings.task_hidden_dim,
        max_candidates=settings.max_candidates,
    )
    ranking.encoder_config(model)
    return _with(model, ranking)


def _with(model: ModelConfig, ranking: RankingConfig | LlatteRankingConfig) -> RankingModelConfig:
    return RankingModelConfig(**{one.name: getattr(model, one.name) for one in fields(model)}, ranking=ranking)


def upstream_model_config(
    upstream: UpstreamConfig, settings: RankingSettings, actions: Sequence[str]
) -> UpstreamModelConfig:
    """The upstream user model that learns what the ranking head learns. actions: as declared, in order of their bits.

    ValueError as `RankingSettings.targets`, and without tasks: nobody would read its vectors.
    """
    if not settings.tasks:
        raise ValueError("ranking.tasks is empty: the upstream user model serves the ranker, and learns its tasks")
    return UpstreamModelConfig(
        upstream=upstream,
        tasks=action_tasks(settings, actions),
        num_actions=STORED_ACTIONS,
        value_thresholds=settings.value_thresholds,
        surfaces=settings.surfaces,
    )


def action_tasks(settings: RankingSettings, actions: Sequence[str]) -> tuple[ActionTask, ...]:
    """What the settings ask to be predicted; arguments and errors as ``with_ranking_head``."""
    return tuple(
        ActionTask(
            name=name,
            kind="mse" if target.is_value else "bce",
            action_bit=target.action_bit,
            value_at_least=target.value_at_least,
            center=settings.value_center if target.is_value else 0.0,
            scale=settings.value_scale if target.is_value else 1.0,
            weight=settings.task_weights.get(name, 1.0),
        )
        for name, target in zip(settings.tasks, settings.targets(actions), strict=True)
    )
