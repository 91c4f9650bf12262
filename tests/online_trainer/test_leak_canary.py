"""A canary for leaks: a planted signal that only the future holds scores at chance, until a leak is opened on purpose.

Items are drawn at random, so nothing predicts them. What would: a *hint*, an event that happened just before its target
and names it, but arrives after it; the interaction that is to be predicted itself; and where that happened, which names
it. The stream goes the real way, from the store through hot histories and examples into prequential metrics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions, JaggedHistories, acts_of
from feature_store.store import FeatureStore
from model.config import ModelConfig
from online_trainer import examples, learner
from online_trainer.learner import OnlineLearner
from tests.online_trainer.conftest import HOT, MODEL, RecordedStream, record_stream

NUM_ITEMS = 60
NUM_TARGETS = 1_000
CHANCE = 10 / (NUM_ITEMS - MODEL.max_len)
"""Ten tries among the items that are not in the history."""
AT_CHANCE = 1.2 * CHANCE
FAR_ABOVE_CHANCE = 2 * CHANCE


def hinted(*, delay: int, num_users: int = 20, num_targets: int = NUM_TARGETS) -> Interactions:
    """Targets in event order; `delay` targets after each arrives the hint that happened half a second before it."""
    rng = np.random.default_rng(3)
    users, targets = rng.integers(0, num_users, num_targets), rng.integers(0, NUM_ITEMS, num_targets)
    hint_of = rng.permutation(NUM_ITEMS)
    time_ms = 1_700_000_000_000 + 1_000 * np.arange(num_targets)
    arrival = np.concatenate([np.arange(num_targets), np.arange(num_targets) + delay + 0.5])
    order = np.argsort(arrival)
    count = 2 * num_targets
    return Interactions(
        user_id=np.concatenate([users, users])[order],
        item_id=np.concatenate([targets, hint_of[targets]])[order],
        event_time_ms=np.concatenate([time_ms, time_ms - 500])[order],
        action=np.ones(count, np.uint32),
        value=np.full(count, np.nan, np.float32),
        event_key=rng.integers(0, 2**63, count).astype(np.uint64),
        seq=np.zeros(count, np.uint32),
        arrival_ms=np.full(count, 1_700_000_000_000, np.int64),
    )


def placed(*, num_users: int = 20, num_events: int = NUM_TARGETS) -> Interactions:
    """Each happens on a surface that names its item."""
    rng = np.random.default_rng(5)
    items = rng.integers(0, NUM_ITEMS, num_events)
    time_ms = 1_700_000_000_000 + 1_000 * np.arange(num_events)
    return Interactions(
        user_id=rng.integers(0, num_users, num_events),
        item_id=items,
        event_time_ms=time_ms,
        action=np.ones(num_events, np.uint32),
        value=np.full(num_events, np.nan, np.float32),
        event_key=rng.integers(0, 2**63, num_events).astype(np.uint64),
        seq=np.zeros(num_events, np.uint32),
        arrival_ms=time_ms,
        surface=(1 + rng.permutation(NUM_ITEMS)[items]).astype(np.uint8),
    )


class ArrivalBlindHistories(HotHistories):
    """The leak: reads all that the store holds up to an event time, whether it had arrived by then or not."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._newest_ms: dict[int, int] = {}

    def apply(self, interactions: Interactions, *, watermark_ms: int = 0) -> None:
        super().apply(interactions, watermark_ms=watermark_ms)
        for user, time_ms in zip(interactions.user_id.tolist(), interactions.event_time_ms.tolist(), strict=True):
            self._newest_ms[user] = max(time_ms, self._newest_ms.get(user, 0))

    def gather(self, user_ids: NDArray[np.int64], *, max_len: int, **_limits: Any) -> JaggedHistories:
        before_ms = np.array([self._newest_ms[user] + 1 for user in user_ids.tolist()])
        return self._store.read(user_ids, max_len=max_len, before_ms=before_ms)


def hit_rates(
    stream: RecordedStream, histories: type[HotHistories] = HotHistories, *, model: ModelConfig = MODEL, **settings: Any
) -> dict[str, float]:
    """HR@10 of both arms over the newer half of the stream, tested before each step."""
    config = replace(stream.config(**settings), model=replace(model, max_items=1000))
    config = replace(config, trainer=replace(config.trainer, metrics_window=NUM_TARGETS))
    trained = OnlineLearner(config, histories(stream.store, HOT), log_id="main")
    batcher = stream.batcher(trained)
    while batch := batcher.take():
        trained.step(batch)
    summary = trained.metrics_summary()
    assert summary["model.window.count"] > 0.8 * NUM_TARGETS
    return {arm: summary[f"{arm}.window.hr_at_10"] for arm in ("model", "popularity")}


@pytest.mark.parametrize("delay", [2, 40], ids=["in the same step", "steps later"])
def test_what_happened_before_but_arrived_after_scores_at_chance(store: FeatureStore, delay: int) -> None:
    rates = hit_rates(record_stream(store, hinted(delay=delay)))
    assert rates["model"] < AT_CHANCE
    assert rates["popularity"] < AT_CHANCE


@pytest.mark.parametrize("delay", [2, 40], ids=["in the same step", "steps later"])
def test_it_does_so_as_well_when_older_interactions_are_replayed(store: FeatureStore, delay: int) -> None:
    assert hit_rates(record_stream(store, hinted(delay=delay)), replay_share=0.5)["model"] < AT_CHANCE


@pytest.mark.parametrize("delay", [2, 40], ids=["in the same step", "steps later"])
def test_the_same_scores_far_above_chance_once_arrival_is_ignored(
    store: FeatureStore, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_overtaken", lambda histories, _row_of: np.zeros(histories.num_interactions, bool))
    stream = record_stream(store, hinted(delay=delay))
    assert hit_rates(stream, HotHistories if delay == 2 else ArrivalBlindHistories)["model"] > FAR_ABOVE_CHANCE


def test_the_outcome_scores_far_above_chance_once_an_input_is_made_from_it(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = examples.build_examples

    def one_too_far(histories: JaggedHistories, new: Interactions, *, max_len: int) -> examples.Examples:
        built = honest(histories, new, max_len=max_len)
        built.item_id[built.positions] = (built.target_item_id + 1) % NUM_ITEMS
        return built

    monkeypatch.setattr(learner, "build_examples", one_too_far)
    stream = record_stream(store, hinted(delay=40))
    assert hit_rates(stream)["model"] > FAR_ABOVE_CHANCE


SURFACES = replace(MODEL, kind="ultra_hstu", surfaces=True)


def test_where_the_next_interaction_happens_is_not_seen_where_it_is_predicted(store: FeatureStore) -> None:
    assert hit_rates(record_stream(store, placed()), model=SURFACES)["model"] < AT_CHANCE


def test_the_same_scores_far_above_chance_once_it_is(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = examples.build_examples

    def one_too_far(histories: JaggedHistories, new: Interactions, *, max_len: int) -> examples.Examples:
        built = honest(histories, new, max_len=max_len)
        of_next = acts_of(new.action, new.surface)[built.target_rows]
        built.acts[built.positions] = of_next
        return built

    monkeypatch.setattr(learner, "build_examples", one_too_far)
    assert hit_rates(record_stream(store, placed()), model=SURFACES)["model"] > FAR_ABOVE_CHANCE
