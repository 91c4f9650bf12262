"""The canary of labels: what only the future says of an item that was shown scores at chance, until a leak is opened.

Whether an item is taken is drawn at random. What would tell: an interaction of the user right after it, and one that
happened right before it but arrived after; both carry the outcome as their action.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from online_trainer.label_queue import LabelBatch, LabelPosition, label_keys
from online_trainer.labelled_items import LabelledItems
from tests.online_trainer.conftest import RecordedStream, record_stream
from tests.online_trainer.test_ranking_learner import NEVER, SETTINGS, learner_of

NUM_SHOWN = 3_200
START_MS = 1_700_000_000_000
CLICK, LIKE = 0b01, 0b10


def telling(*, after_ms: int) -> tuple[Interactions, NDArray[np.int64]]:
    """One interaction for each item shown, `after_ms` after it, which arrives a second after it; and the outcomes."""
    rng = np.random.default_rng(4)
    outcomes = rng.integers(0, 2, NUM_SHOWN)
    shown_at_ms = START_MS + 10_000 * np.arange(NUM_SHOWN)
    interactions = Interactions(
        user_id=np.arange(NUM_SHOWN) % 20,
        item_id=rng.integers(0, 40, NUM_SHOWN),
        event_time_ms=shown_at_ms + after_ms,
        action=np.where(outcomes == 1, LIKE, CLICK).astype(np.uint32),
        value=np.full(NUM_SHOWN, np.nan, np.float32),
        event_key=rng.integers(0, 2**63, NUM_SHOWN).astype(np.uint64),
        seq=np.zeros(NUM_SHOWN, np.uint32),
        arrival_ms=shown_at_ms + 1_000,
    )
    return interactions, outcomes


def labels(interactions: Interactions, outcomes: NDArray[np.int64], after_ms: int, part: slice) -> LabelBatch:
    """One random item shown to the user of each interaction."""
    shown_at_ms = interactions.event_time_ms[part] - after_ms
    num = len(shown_at_ms)
    items = np.random.default_rng(part.start).integers(0, 40, num)
    return LabelBatch(
        items=LabelledItems(
            user_id=interactions.user_id[part],
            shown_at_ms=shown_at_ms,
            known_before_ms=shown_at_ms,
            written_before_ms=shown_at_ms,
            below_seq=np.full(num, NEVER),
            surface=np.zeros(num, np.uint8),
            offsets=np.arange(num + 1, dtype=np.int64),
            item_id=items,
            action=outcomes[part].astype(np.uint32),
            value=np.full(num, np.nan, np.float32),
            is_measured=np.ones(num, np.bool_),
        ),
        keys=np.concatenate([label_keys(f"{part.start + n}", "x", items[n : n + 1]) for n in range(num)]),
        is_late=np.zeros(num, np.bool_),
        positions={0: LabelPosition(part.stop)},
    )


def auc_of(store: FeatureStore, after_ms: int) -> float:
    """Over the newest quarter: labels are learned when everything is in the store, as after a backlog."""
    interactions, outcomes = telling(after_ms=after_ms)
    stream: RecordedStream = record_stream(store, interactions)
    learner = learner_of(stream, replace(SETTINGS, dense_learning_rate=4e-3), metrics_window=NUM_SHOWN // 4)
    batcher = stream.batcher(learner, 256)
    while batch := batcher.take():
        learner.step(batch)
    for start in range(0, NUM_SHOWN, 16):
        learner.learn_labels(labels(interactions, outcomes, after_ms, slice(start, start + 16)))
    return learner.metrics_summary()["ranking.click.window.auc"]


@pytest.mark.parametrize("after_ms", [500, -500], ids=["happened after", "happened before, arrived after"])
def test_what_was_not_known_when_the_item_was_shown_scores_at_chance(store: FeatureStore, after_ms: int) -> None:
    assert 0.42 < auc_of(store, after_ms) < 0.58


@pytest.mark.parametrize(
    ("after_ms", "leak"),
    [(500, {"shown_at_ms": 1_000, "known_before_ms": 10_000}), (-500, {"known_before_ms": 10_000})],
    ids=["happened after", "happened before, arrived after"],
)
def test_the_same_scores_far_above_chance_once_the_leak_is_opened(
    store: FeatureStore, after_ms: int, leak: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HotHistories.gather

    def later(hot: HotHistories, user_ids: Any, *, before_ms: Any, **options: Any) -> Any:
        found = honest(hot, user_ids, before_ms=before_ms + leak.get("shown_at_ms", 0), **options)
        return replace(found, arrival_ms=found.arrival_ms - leak["known_before_ms"])

    def gather(hot: HotHistories, user_ids: Any, **options: Any) -> Any:
        # Of labels only: histories of interactions are asked for without a time.
        return (later if "before_ms" in options else honest)(hot, user_ids, **options)

    monkeypatch.setattr(HotHistories, "gather", gather)
    assert auc_of(store, after_ms) > 0.9
