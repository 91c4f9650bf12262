from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest.replay import RecordedStream, ReplayConfig
from feature_store.config import FeatureStoreConfig
from feature_store.ids import event_key
from feature_store.records import StoreTotals
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from ops.demo.checks import (
    Check,
    Truth,
    check_histories,
    check_learned,
    check_processes,
    check_refusals,
    check_requests,
    check_served,
    check_titles,
    check_vectors,
    truth_of,
)
from ops.demo.plan import DemoOptions, choose_ports, tables
from ops.demo.state import Sample, VectorFigures, WorkerFigures
from ops.demo.watch import BackgroundLoad, log_tail
from ops.demo.words import vectors_sentences
from ops.supervisor import ChildStatus
from serving.messages import Recommendation
from tests.feature_store.databases import migrated_database
from tests.feature_store.truth import Row, append


def _recorded() -> RecordedStream:
    return RecordedStream(
        user_id=[1, 2, 1],
        item_id=[10, 11, 12],
        event_time_ms=np.array([1_000, 2_000, 3_000], np.int64),
        row=np.array([2, 0, 1], np.int64),
        value=None,
        event_id=None,
    )


def _load() -> BackgroundLoad:
    return BackgroundLoad(requests_per_s=4.0, user_ids=[1, 2, 1], num_sent=lambda: 3)


def _answer(version: int | None, *, weights: str = "t1") -> Recommendation:
    return Recommendation(
        request_id="r",
        snapshot_version=version,
        weights_event_time=weights,
        history_event_time=None,
        fallback=version is None,
        fallback_reason=None,
        from_session=False,
        items=[],
    )


def test_the_truth_is_what_the_replay_sends() -> None:
    recorded, config = _recorded(), ReplayConfig(event_id_prefix="films")
    sent = [event_key(recorded.event(place, config).event_id) for place in range(3)]
    assert truth_of(recorded, "films") == Truth(3, sum(sent) % 2**64)
    assert truth_of(recorded, "films").plus([2**64 - 1, 5]) == Truth(5, (sum(sent) + 4) % 2**64)


def _totals(truth: Truth, *, more: int = 0, fingerprint: int | None = None) -> StoreTotals:
    return StoreTotals(
        num_users=2,
        num_interactions=truth.num_interactions + more,
        fingerprint=truth.fingerprint if fingerprint is None else fingerprint,
    )


def test_one_missing_or_one_other_event_makes_histories_untrue() -> None:
    truth = Truth(3, 123)
    assert check_histories(truth, _totals(truth)).is_ok
    assert not check_histories(truth, _totals(truth, more=-1)).is_ok
    assert not check_histories(truth, _totals(truth, fingerprint=124)).is_ok


@pytest.mark.parametrize(
    ("change", "is_ok"),
    [
        ({}, True),
        ({"interactions": 4}, False),
        ({"fingerprint": "124"}, False),
        ({"supervised": 2}, False),
        ({"supervised": 1, "quarantined": 1}, False),
    ],
)
def test_the_trainers_account_must_equal_the_store(change: dict[str, Any], is_ok: bool) -> None:
    account = {
        "interactions": 3,
        "fingerprint": "123",
        "supervised": 1,
        "first": 2,
        "out_of_reach": 0,
        "quarantined": 0,
    }
    if change == {"supervised": 1, "quarantined": 1}:
        account |= {"first": 1}
    assert check_learned(_totals(Truth(3, 123)), account | change).is_ok is is_ok


def test_every_worker_must_serve_everything_and_fail_nothing() -> None:
    load = _load()
    load.note("a", _answer(1))
    full = WorkerFigures(version=5, learned_interactions=3)
    assert check_served(Truth(3, 0), Sample(at_s=0, workers=(full, full))).is_ok
    assert not check_served(Truth(3, 0), Sample(at_s=0, workers=(full, WorkerFigures(learned_interactions=2)))).is_ok
    assert check_requests(load, Sample(at_s=0, workers=(full,))).is_ok
    assert not check_requests(load, Sample(at_s=0, workers=(WorkerFigures(num_errors=1),))).is_ok
    load.failures["status 500"] += 1
    assert not check_requests(load, Sample(at_s=0, workers=(full,))).is_ok
    assert not check_requests(_load(), Sample(at_s=0)).is_ok  # nothing asked proves nothing


def test_answers_that_no_single_weights_can_have_given_are_noticed() -> None:
    load = _load()
    for version, weights in ((None, "t0"), (1, "t1"), (2, "t2"), (2, "t2")):
        load.note("a", _answer(version, weights=weights))
    load.note("b", _answer(1, weights="t1"))
    assert load.contradictions == []
    load.note("b", _answer(2, weights="t1"))
    load.note("a", _answer(1, weights="t1"))
    assert [words.split(" ")[0] for words in load.contradictions] == ["version", "a"]
    assert (load.num_answered, load.num_fallback) == (7, 1)


def test_refusals_lost_titles_and_processes_that_are_down_are_named() -> None:
    assert check_refusals({"refused": {}}).is_ok
    assert check_refusals({"refused": {"oversize": 2}}).detail == "2 × oversize"
    assert check_titles(5, 5).is_ok
    assert not check_titles(4, 5).is_ok
    back = ChildStatus(
        name="trainer", state="running", pid=1, num_starts=2, last_exit=-9, restart_in_s=None, last_lines=()
    )
    assert check_processes([back]).is_ok
    assert "trainer was started again 1×" in check_processes([back]).detail
    down = ChildStatus(
        name="ingest", state="waiting", pid=None, num_starts=1, last_exit=1, restart_in_s=0.5, last_lines=()
    )
    assert not check_processes([back, down]).is_ok


def test_a_failure_shows_the_end_of_the_log_it_names(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    assert log_tail(log) == f"; see {log}"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    tail = log_tail(log, 2)
    assert str(log) in tail
    assert tail.endswith("  line 98\n  line 99")


def test_the_demo_never_reaches_for_a_broker_or_database_of_somebody_else(tmp_path: Path) -> None:
    changed = tables(DemoOptions(data_dir=tmp_path), choose_ports(), "demo-1")
    assert changed["log"]["bootstrap_servers"].startswith("127.0.0.1:")
    assert changed["store"]["url"].startswith(f"sqlite:///{tmp_path}")


def test_every_user_of_late_must_have_a_vector_of_its_whole_history_and_of_one_version(tmp_path: Path) -> None:
    day_ms = 86_400_000

    def vectors(store: FeatureStore, users: list[int]) -> None:
        new = NewVectors(
            user_id=np.array(users, np.int64),
            next_seq=np.ones(len(users), np.int64),
            as_of_ms=np.full(len(users), 5 * day_ms),
            vector=np.ones((len(users), 4), np.float32),
        )
        with store.transaction() as transaction:
            transaction.user_states.write("default", 1, new, written_at_ms=1)

    with migrated_database("sqlite", tmp_path) as url:
        store = FeatureStore(FeatureStoreConfig(url=url))

        def check() -> Check:
            return check_vectors(store, model="default", width=4, max_age_ms=day_ms)

        # User 3 was there long ago.
        append(store, [Row(1, 5 * day_ms, 1), Row(2, 5 * day_ms, 2), Row(3, day_ms, 3)])
        with store.transaction() as transaction:
            transaction.lock_position("main", "interactions", 0)
            transaction.set_position("main", "interactions", 0, 3, watermark_ms=5 * day_ms)
        assert not check().is_ok
        with store.transaction() as transaction:
            transaction.user_states.begin_version("default", 1, created_at_ms=0)
            transaction.user_states.serve_version("default", 1, from_ms=0)
        vectors(store, [1, 2])
        assert check().is_ok
        assert check().detail == "2 of 2 users of the last 1 days; version 1"
        append(store, [Row(2, 5 * day_ms + 1, 4)])
        assert not check().is_ok
        assert check().detail == "1 of 2 users of the last 1 days; version 1"
        store.close()


def test_what_is_said_of_vectors_begins_before_there_are_any() -> None:
    assert vectors_sentences(VectorFigures()) == ["0 vectors of users computed, upstream version none in effect."]
    pages = {"version": 2, "vectors": 1_234}, {"ranking": {"vectors": {"found": 30, "missing": 10}}}
    computed, learned = vectors_sentences(VectorFigures.of_status(*pages, "value>=8"))
    assert computed == "1,234 vectors of users computed, upstream version 2 in effect."
    assert learned == "The ranker learned from 40 ratings; of 75% the user had a vector."
