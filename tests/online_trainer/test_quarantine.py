"""A batch that would do harm is set aside and kept to be looked at; a stream that has changed is learned from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from online_trainer.learner import OnlineLearner
from online_trainer.quarantine import (
    LossGuard,
    SetAside,
    forget_users,
    list_set_aside,
    read_interactions,
    write_set_aside,
)
from tests.online_trainer.conftest import RecordedStream, record_stream, walks

BATCH = 50


def guard(**settings: float) -> LossGuard:
    found = LossGuard(**({"spike_deviations": 8.0, "max_in_a_row": 3} | settings))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for loss in rng.normal(5.0, 0.1, 100):
        assert found.objection(float(loss), BATCH) is None
    return found


def test_a_spike_is_objected_to_and_does_not_change_what_is_typical() -> None:
    one = guard()
    before = one.typical_loss
    assert one.objection(6.5, BATCH) == "spike"
    assert one.objection(float("nan"), BATCH) == one.objection(float("inf"), BATCH) == "loss"
    assert one.typical_loss == before
    assert one.objection(5.3, BATCH) is None


def test_one_interaction_may_have_a_loss_that_would_be_a_spike_of_a_whole_batch() -> None:
    # The mean of 50 deviates by .1, so one of them by .7.
    assert guard().objection(8.0, BATCH) == "spike"
    assert guard().objection(8.0, 1) is None
    assert guard().objection(20.0, 1) == "spike"


def test_batches_larger_than_ever_are_not_held_to_less_than_steps_differ() -> None:
    one = LossGuard(spike_deviations=8.0, max_in_a_row=3)
    for loss in np.random.default_rng(0).normal(5.0, 0.1, 100):
        one.objection(float(loss), 1)
    assert one.objection(5.5, 10_000) is None


def test_a_state_of_earlier_versions_is_read() -> None:
    one, again = guard(), LossGuard(spike_deviations=8.0, max_in_a_row=3)
    state = one.state()
    del state["sizes"]
    again.load_state(state)
    assert again.typical_loss == one.typical_loss
    assert again.objection(5.3, BATCH) is None


def test_so_many_spikes_in_a_row_are_a_change_of_the_stream() -> None:
    one = guard()
    assert [one.objection(7.0, BATCH) for _ in range(4)] == ["spike", "spike", "spike", None]
    assert one.typical_loss is None, "what was typical is no longer"
    assert one.objection(9.0, BATCH) is None


def test_nothing_is_a_spike_before_enough_is_known_or_where_it_is_turned_off() -> None:
    fresh = LossGuard(spike_deviations=8.0, max_in_a_row=3)
    assert [fresh.objection(loss, BATCH) for loss in (5.0, 50.0, 5.0)] == [None, None, None]
    assert guard(spike_deviations=0).objection(1000.0, BATCH) is None


def test_a_guard_continues_from_its_state_exactly() -> None:
    one, again = guard(), LossGuard(spike_deviations=8.0, max_in_a_row=3)
    one.objection(7.0, BATCH)
    again.load_state(json.loads(json.dumps(one.state())))
    losses = np.random.default_rng(1).normal(5.5, 0.5, 300).tolist()
    assert [one.objection(loss, BATCH) for loss in losses] == [again.objection(loss, BATCH) for loss in losses]


def poisoned(events: Interactions, *, every: int, first: int) -> tuple[Interactions, np.ndarray[tuple[int], Any]]:
    """From an event on every n-th batch is a bot's: items at random. And which events are."""
    number = np.arange(len(events))
    is_bot = (number >= first) & ((number // BATCH) % every == every - 1)
    items = np.random.default_rng(1).permutation(events.item_id)
    return dataclasses.replace(events, item_id=np.where(is_bot, items, events.item_id)), is_bot


def learn(stream: RecordedStream, **settings: float) -> OnlineLearner:
    learner = stream.learner(**settings)
    batcher = stream.batcher(learner, BATCH)
    while (batch := batcher.take()) is not None:
        learner.step(batch)
    return learner


def test_poisoned_batches_are_set_aside_and_the_rest_is_learned_as_if_they_had_not_been(store: FeatureStore) -> None:
    # They begin when users have walked for long: then the next item is nearly certain.
    events, is_bot = poisoned(walks(9_000, num_users=60, num_items=12), every=20, first=6_000)
    learner = learn(record_stream(store, events), spike_deviations=8.0)
    assert [why.reason for why, _ in learner.set_aside] == ["spike"] * 3
    assert all(why.loss > why.typical_loss for why, _ in learner.set_aside)  # type: ignore[operator]
    taken = np.concatenate([interactions.event_key for _, interactions in learner.set_aside])
    assert set(taken.tolist()) == set(events.event_key[is_bot].tolist())
    ledger = learner.ledger
    assert ledger.num_quarantined == 150
    assert ledger.num_supervised + ledger.num_first + ledger.num_out_of_reach + ledger.num_quarantined == 9_000


def test_a_gradient_that_is_no_number_is_not_learned_from(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = record_stream(store, walks(300))
    learner, batcher = stream.learner(), stream.batcher(stream.learner())
    for _ in range(3):
        batch = batcher.take()
        assert batch is not None
        learner.step(batch)
    before = {name: tensor.clone() for name, tensor in learner.model.dense_state().items()}
    learner.model.trend_coefficient.register_hook(lambda grad: grad * torch.nan)  # type: ignore[no-untyped-call]
    batch = batcher.take()
    assert batch is not None
    learner.step(batch)
    assert [why.reason for why, _ in learner.set_aside] == ["gradient"]
    for name, tensor in learner.model.dense_state().items():
        assert torch.equal(tensor, before[name]), name


def why(step: int, reason: str = "spike") -> SetAside:
    return SetAside(step=step, reason=reason, loss=9.5, typical_loss=5.0, num_interactions=30, watermark_ms=1)


def test_what_is_set_aside_is_written_once_however_often_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    events = walks(30)
    assert list_set_aside(tmp_path / "none") == []
    for step in (3, 7, 7, 12):
        write_set_aside(tmp_path, why(step), events, keep=2)
    assert list_set_aside(tmp_path) == [why(7), why(12)]
    assert read_interactions(tmp_path, why(12))["item_id"].to_list() == events.item_id.tolist()
    assert sorted(path.name[:11] for path in tmp_path.iterdir()) == ["s0000000007"] * 2 + ["s0000000012"] * 2


def test_a_step_of_the_ranking_head_is_kept_beside_the_trainers_of_the_same_number(tmp_path: Path) -> None:
    events = walks(30)
    kept = (why(7), why(7, "ranking_spike"))
    for number, one in enumerate(kept):
        write_set_aside(tmp_path, one, events.take(slice(number, None)), keep=5)
    assert sorted(list_set_aside(tmp_path), key=kept.index) == list(kept)
    assert [len(read_interactions(tmp_path, one)) for one in kept] == [len(events), len(events) - 1]


def test_forgotten_users_leave_no_byte_in_it(tmp_path: Path) -> None:
    events = walks(200)
    user = int(events.user_id[0])
    write_set_aside(tmp_path, why(1), events, keep=5)
    write_set_aside(tmp_path, why(2), events.take(events.user_id != user), keep=5)
    untouched = (tmp_path / "s0000000002.parquet").stat().st_mtime_ns
    forget_users(tmp_path, (user, 10**12))
    kept = read_interactions(tmp_path, why(1))["user_id"]
    assert len(kept) == int((events.user_id != user).sum())
    assert user not in kept.to_list()
    assert (tmp_path / "s0000000002.parquet").stat().st_mtime_ns == untouched


def test_what_cannot_be_rewritten_without_a_forgotten_user_is_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events = walks(30)
    for step in (1, 2):
        write_set_aside(tmp_path, why(step), events, keep=5)
    (tmp_path / "s0000000001.parquet").write_bytes(b"")  # a power failure
    (tmp_path / "s0000000003.parquet.tmp").write_bytes((tmp_path / "s0000000002.parquet").read_bytes())  # a crash
    forget_users(tmp_path, (int(events.user_id[0]),))
    assert "s0000000001.parquet is deleted" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == ["s0000000002.parquet"]
    assert len(read_interactions(tmp_path, why(2))) == int((events.user_id != events.user_id[0]).sum())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"step": "7"}'])
def test_a_file_that_says_nothing_stops_nobody_and_hides_nothing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s0000000001.json").write_bytes(content)
    for step in (2, 3):
        write_set_aside(tmp_path, why(step), walks(30), keep=1)
    assert list_set_aside(tmp_path) == [why(3)]
    assert "s0000000001.json cannot be read" in caplog.text
