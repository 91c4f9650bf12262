"""A stream that outruns the trainer: what it does is configured, counted, visible, and the account stays whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_store.store import FeatureStore
from model.snapshot import list_versions, read_manifest
from online_trainer.batching import LagRule, MicroBatch, MicroBatcher
from online_trainer.config import TrainerConfig
from online_trainer.learner import OnlineLearner
from ops.verify import take_account
from tests.online_trainer.conftest import RecordedStream, record_stream, walks
from tests.online_trainer.test_batching import drain, update_of
from tests.online_trainer.test_daemon import Site, learn, running, site, until
from tests.online_trainer.test_learner import run

__all__ = ["site"]

BURST = 1_200


def behind(policy: Any, *, at: int = 8, max_tokens: int = 1_000) -> MicroBatcher:
    return MicroBatcher(
        max_interactions=4,
        max_tokens=max_tokens,
        max_len=10,
        positions={},
        lag=LagRule(policy=policy, lag_interactions=at, max_interactions=6),
    )


def items(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.interactions.item_id.tolist() for batch in batches]


def test_falling_behind_changes_no_batch() -> None:
    batcher = behind("fall_behind")
    batcher.add(update_of(list(range(20))), 0)
    assert batcher.is_behind()
    assert items(drain(batcher)) == [list(range(n, n + 4)) for n in range(0, 20, 4)]


def test_larger_batches_end_when_the_trainer_has_caught_up() -> None:
    batcher = behind("larger_batches")
    batcher.add(update_of(list(range(20))), 0)
    batches = drain(batcher)
    assert [len(batch.interactions) for batch in batches] == [6, 6, 4, 4]
    assert [batch.is_large for batch in batches] == [True, True, False, False]
    assert not any(len(batch.thinned) for batch in batches)


def test_larger_batches_hold_more_tokens_in_proportion() -> None:
    # Ten tokens of history each: two users fit 20 tokens, three fit 30.
    batcher = behind("larger_batches", max_tokens=20)
    batcher.add(update_of(list(range(12)), seq=9), 0)
    assert [len(batch.interactions) for batch in drain(batcher)][:3] == [3, 3, 2]


def test_thinning_learns_from_the_newest_and_accounts_for_the_rest() -> None:
    batcher = behind("thin")
    batcher.add(update_of(list(range(20))), 7)
    (batch,) = drain(batcher)
    assert batch.interactions.item_id.tolist() == [16, 17, 18, 19]
    assert batch.append_ms.tolist() == [1_016, 1_017, 1_018, 1_019]
    assert batch.thinned.item_id.tolist() == list(range(16))
    assert batch.taken().item_id.tolist() == list(range(20))
    assert (batch.positions["main", 0].update_offset, batch.positions["main", 0].source_offset) == (8, 20)


def test_thinning_goes_by_the_order_of_the_log_over_all_partitions() -> None:
    batcher = behind("thin", at=8)
    batcher.add(update_of([0, 10, 20, 30, 40]), 0)
    batcher.add(update_of([5, 15, 25, 35, 45], partition=1), 0)
    (batch,) = drain(batcher)
    assert batch.interactions.item_id.tolist() == [30, 135, 40, 145]
    assert sorted(batch.thinned.item_id.tolist()) == [0, 10, 20, 105, 115, 125]
    assert {source[1]: position.source_offset for source, position in batch.positions.items()} == {0: 41, 1: 46}


def test_forgotten_users_are_dropped_and_not_thinned() -> None:
    batcher = behind("thin", at=4)
    batcher.add(update_of(list(range(8)), users=[1, 2] * 4), 0)
    batcher.forget(0, (2,), 1)
    (batch,) = drain(batcher)
    assert batch.interactions.item_id.tolist() == [4, 6]
    assert batch.thinned.item_id.tolist() == [0, 2]
    assert batch.dropped.item_id.tolist() == [1, 3, 5, 7]


def run_thinned(stream: RecordedStream, learner: OnlineLearner) -> None:
    """The first 592 of 1,200 in their turn; then the rest at once, thinned to the newest 16."""
    run(stream, learner, steps=37)
    batch = stream.batcher(learner, lag=LagRule(policy="thin", lag_interactions=16, max_interactions=16)).take()
    assert batch is not None
    learner.step(batch)


def test_what_is_thinned_is_in_histories_trends_and_the_account_and_is_not_supervised(store: FeatureStore) -> None:
    stream = record_stream(store, walks(BURST))
    learner = stream.learner()
    run_thinned(stream, learner)
    ledger, totals = learner.ledger, store.totals()
    assert ledger.num_thinned == 592
    assert (ledger.num_interactions, ledger.fingerprint) == (totals.num_interactions, totals.fingerprint)
    assert ledger.num_supervised + ledger.num_first + ledger.num_thinned == BURST
    assert learner.metrics_summary()["model.lifetime.count"] == ledger.num_supervised
    # Histories are whole: a user's newest interactions are there, thinned or not.
    hot = learner._hot.gather(np.arange(30), max_len=8)
    stored = store.read(np.arange(30), max_len=8)
    np.testing.assert_array_equal(hot.event_key, stored.event_key)
    # So are trends: as in a learner that has learned from everything.
    whole = run(stream, stream.learner())
    rows, whole_rows = (one.model.items.lookup(np.arange(40)) for one in (learner, whole))
    np.testing.assert_allclose(
        learner.model.items.log_popularity()[rows].numpy(), whole.model.items.log_popularity()[whole_rows].numpy()
    )


def test_a_run_that_was_thinned_continues_from_its_checkpoint_bit_by_bit(store: FeatureStore) -> None:
    stream = record_stream(store, walks(BURST))
    learner = stream.learner()
    run_thinned(stream, learner)
    stored = learner.capture_checkpoint()
    assert stored.state["ledger"]["num_thinned"] == 592
    continued = stream.learner()
    continued.load_checkpoint(stored)
    assert continued.ledger == learner.ledger
    assert stream.batcher(continued).num_pending == 0


@pytest.mark.parametrize("policy", ["thin", "larger_batches", "fall_behind"])
async def test_a_burst_is_dealt_with_as_configured_and_seen(
    site: Site, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.send(record_stream(site.store, walks(BURST)).updates)
    limits: dict[str, Any] = {"lag_interactions": 200, "max_pending_interactions": 400, "poll_records": 4}
    daemon = site.daemon(lag_policy=policy, lag_batch_interactions=64, **limits)
    peak = 0

    def is_done() -> bool:
        nonlocal peak
        peak = max(peak, int(str(daemon.status()["pending"])))
        return daemon.status()["interactions"] == BURST

    async with running(daemon):
        await until(is_done)
        await until(lambda: not daemon._lag.newest.is_behind)
    status: Any = daemon.status()
    lag = status["lag"]
    assert lag["policy"] == policy
    assert status["fingerprint"] == str(site.store.totals().fingerprint)
    assert status["supervised"] + status["first"] + status["out_of_reach"] + lag["thinned"] == BURST
    assert (lag["thinned"] > 0) == (policy == "thin")
    assert (lag["large_steps"] > 0) == (policy == "larger_batches")
    # Memory: what waits is bounded by the limit and one poll of four messages of fifty.
    assert peak <= 400 + 4 * 50
    assert "the stream outruns the trainer" in caplog.text
    assert "the trainer has caught up" in caplog.text
    account = take_account(site.store, site.root / "snapshots", "default")
    assert account.is_equal
    newest = list_versions(site.root / "snapshots", "default")[-1]
    assert read_manifest(site.root / "snapshots", "default", newest).lineage.num_thinned == lag["thinned"]
    assert (f"learned from all but {lag['thinned']:,}" in account.sentence()) == (policy == "thin")


async def test_a_stream_that_is_kept_up_with_is_not_thinned(site: Site) -> None:
    updates = record_stream(site.store, walks(400)).updates
    daemon = site.daemon(lag_policy="thin", lag_interactions=100)
    for number, update in enumerate(updates, start=1):
        site.send([update])
        status: Any = await learn(daemon, number * 50)
        daemon = site.daemon(lag_policy="thin", lag_interactions=100)
    assert status["lag"]["thinned"] == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lag_policy": "drop"}, "lag_policy"),
        ({"lag_policy": "thin", "lag_interactions": 30_000}, "max_pending_interactions"),
        ({"lag_policy": "thin", "lag_interactions": 100}, "batch_interactions"),
        ({"lag_policy": "larger_batches", "lag_batch_interactions": 64}, "lag_batch_interactions"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainerConfig(**settings)
