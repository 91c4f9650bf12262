"""Items get and lose their rows as the settings say, and everything kept by row follows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from online_trainer.config import ItemsConfig
from online_trainer.item_lifetimes import Admission
from online_trainer.learner import OnlineLearner
from tests.online_trainer.conftest import RecordedStream, record_stream, walks

HOUR_MS = 3_600_000


def keys(number: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.random.default_rng(seed).integers(0, 2**63, number).astype(np.uint64)


def learn(stream: RecordedStream, learner: OnlineLearner) -> None:
    batcher = stream.batcher(learner)
    while (batch := batcher.take()) is not None:
        learner.step(batch)


def waves(num_events: int, *, num_items: int, per_wave: int) -> Interactions:
    """Walks through items of which a wave of per_wave events knows its own."""
    stream = walks(num_events, num_items=num_items)
    wave = np.arange(num_events) // per_wave
    return dataclasses.replace(
        stream,
        item_id=stream.item_id + 1000 * wave,
        event_time_ms=1_700_000_000_000 + np.arange(num_events) * HOUR_MS // 10,
    )


def test_an_item_passes_with_its_nth_interaction_wherever_the_others_were() -> None:
    admission = Admission(ItemsConfig(min_interactions=3))
    ids = np.array([7, 8, 7, 9, 7, 8])
    assert admission.admitted(ids, keys(6)).tolist() == [False, False, False, False, True, False]
    assert admission.admitted(np.array([9, 8, 9]), keys(3)).tolist() == [False, True, True]


def test_counts_of_many_items_are_hardly_ever_too_high() -> None:
    admission = Admission(ItemsConfig(min_interactions=2))
    rng = np.random.default_rng(0)
    wrongly = sum(
        int(admission.admitted(some, keys(len(some))).sum())
        for some in np.array_split(rng.choice(1 << 60, 300_000, replace=False), 30)
    )
    assert wrongly < 0.01 * 300_000


def test_counts_continue_from_their_state_and_are_halved() -> None:
    config = ItemsConfig(min_interactions=4)
    admission, again = Admission(config), Admission(config)
    admission.admitted(np.array([5, 5, 6]), keys(3))
    again.load_state(admission.state())
    assert again.admitted(np.array([5, 5]), keys(2)).tolist() == [False, True]
    admission.admitted(np.arange(1 << 19) + 100, keys(1 << 19))
    assert admission.admitted(np.array([5, 5, 5]), keys(3)).tolist() == [False, False, True], "two became one"


def test_the_coin_passes_the_share_that_is_set_and_the_same_events_again() -> None:
    admission = Admission(ItemsConfig(admission_probability=0.2))
    passed = admission.admitted(np.arange(20_000), keys(20_000))
    assert 0.19 < passed.mean() < 0.21
    assert (admission.admitted(np.arange(20_000), keys(20_000)) == passed).all()


def test_items_that_are_not_admitted_are_misses_and_every_interaction_is_accounted_for(store: FeatureStore) -> None:
    stream = record_stream(store, walks(600, num_items=200))
    learner = stream.learner(items=ItemsConfig(min_interactions=3))
    learn(stream, learner)
    ledger = learner.ledger
    counts = np.bincount(walks(600, num_items=200).item_id)
    assert learner.num_items == (counts >= 3).sum()
    assert ledger.num_unlisted > 100
    assert ledger.num_supervised + ledger.num_first + ledger.num_out_of_reach + ledger.num_unlisted == 600
    predicted = learner.metrics_summary()["model.lifetime.count"]
    assert predicted == ledger.num_supervised + ledger.num_unlisted


def test_old_items_lose_their_rows(store: FeatureStore) -> None:
    stream = record_stream(store, waves(900, num_items=20, per_wave=300))  # 30 hours a wave
    learner = stream.learner(items=ItemsConfig(max_age_d=1.0))
    learn(stream, learner)
    assert sorted(learner.model.items.ids() // 1000) == [2] * 20, "the last wave's alone are left"
    assert learner.ledger.num_items_retired == 40


def test_a_full_table_makes_room_by_popularity(store: FeatureStore) -> None:
    events = waves(1600, num_items=20, per_wave=100)
    events = dataclasses.replace(events, item_id=np.where(np.arange(1600) % 4 == 0, 5, events.item_id))
    stream = record_stream(store, events)
    learner = stream.learner(items=ItemsConfig(retired_share=0.2), max_items=60, batch_interactions=16)
    learn(stream, learner)
    assert learner.ledger.num_items_retired >= 200
    assert learner.num_items <= 60
    assert learner.model.items.lookup(np.array([5])) >= 0, "the popular one has stayed"
    assert (learner.model.items.ids() // 1000).max() == 15


@pytest.mark.parametrize("at", [10, 40])
def test_a_checkpoint_between_retirements_continues_bit_by_bit(store: FeatureStore, at: int) -> None:
    stream = record_stream(store, waves(900, num_items=20, per_wave=100))
    config = {
        "items": ItemsConfig(max_age_d=0.5, min_interactions=2, retired_share=0.1),
        "max_items": 45,
        "batch_interactions": 16,
    }
    whole, first, second = (stream.learner(**config) for _ in range(3))
    learn(stream, whole)
    batcher = stream.batcher(first)
    for _ in range(at):
        batch = batcher.take()
        assert batch is not None
        first.step(batch)
    second.load_checkpoint(first.capture_checkpoint())
    learn(stream, second)
    want, got = whole.capture_checkpoint(), second.capture_checkpoint()
    assert got.state == want.state
    for name, tensor in want.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
