"""The trainings that a run's arms need, made from its settings."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

from backtest.answers import Answers
from backtest.batch_trained import BatchTraining
from backtest.durations import duration_ms
from backtest.online_arms import OnlineArm
from backtest.run_config import BacktestConfig
from backtest.training import Training
from backtest.upstream_replay import UpstreamReplay
from feature_store.hot import HotHistories
from feature_store.store import FeatureStore
from model.transducers import with_action_bits
from online_trainer.learner import OnlineLearner
from online_trainer.learner_config import LearnerConfig


def build_trainings(
    config: BacktestConfig,
    learner: LearnerConfig,
    hot: HotHistories,
    answers: Answers,
    *,
    log_id: str,
    upstream: UpstreamReplay | None = None,
) -> list[Training]:
    """One for each set of settings; the first has the run's own, and its test ranks for the baselines.

    With users' vectors, behind it one without arms for each further way to read them.
    """
    arms_of: dict[str, list[OnlineArm]] = {"{}": []}
    for arm, _ in config.all_arms():
        if arm.learns_online:
            arms_of.setdefault(json.dumps(arm.settings, sort_keys=True), []).append(arm.online_arm())
    late_ms = duration_ms(config.late, "late")
    lags_ms = (None,) if upstream is None else config.vector_lags_ms()

    def training(settings: str, arms: list[OnlineArm], lag_ms: int | None) -> Training:
        vectors = None if upstream is None or lag_ms is None else upstream.reader(lag_ms)
        own = with_settings(learner, json.loads(settings))
        return Training(OnlineLearner(own, hot, log_id=log_id, vectors=vectors), arms, answers, late_ms=late_ms)

    first, *others = [training(settings, arms, lags_ms[0]) for settings, arms in arms_of.items()]
    return [first, *(training("{}", [], lag_ms) for lag_ms in lags_ms[1:]), *others]


def build_batch_trained(
    config: BacktestConfig, learner: LearnerConfig, store: FeatureStore, answers: Answers
) -> list[BatchTraining]:
    """The arms that are retrained or fine-tuned."""
    late_ms = duration_ms(config.late, "late")
    return [
        BatchTraining(arm.batch_trained_arm(), with_settings(learner, arm.settings), store, answers, late_ms=late_ms)
        for arm, _ in config.all_arms()
        if not arm.learns_online
    ]


def with_settings(learner: LearnerConfig, settings: dict[str, dict[str, Any]]) -> LearnerConfig:
    """The learner's settings with some changed; raises ValueError for one that does not exist or is out of range."""
    changed = {}
    for table, values in settings.items():
        own = getattr(learner, table)
        known = [one.name for one in fields(own)]
        for name in values:
            if name not in known:
                raise ValueError(f"an arm sets {table}.{name}, which does not exist: known are {', '.join(known)}")
        changed[table] = replace(own, **values)
    found = replace(learner, **changed)
    return replace(found, model=with_action_bits(found.model, found.actions))


def with_seed(learner: LearnerConfig, seed: int) -> LearnerConfig:
    """The learner's settings for one run of a sweep."""
    return replace(learner, trainer=replace(learner.trainer, seed=seed), model=replace(learner.model, seed=seed))
