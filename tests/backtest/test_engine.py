"""A backtest is a function of log, settings and seed, interrupted or not, and its arms are what their names say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest.arrivals import ArrivalConfig
from backtest.run_config import ArmConfig
from backtest.run_setup import with_seed
from backtest.run_state import RunOutcome
from feature_store.store import FeatureStore
from model.ranking import MISS_RANK
from online_trainer.prequential import RankMetrics
from tests.backtest.conftest import (
    LEARNER,
    START_MS,
    Log,
    parts,
    run,
    stopped_after,
    table,
    table_bytes,
    walks,
    without_cpu,
)

EVERYTHING: dict[str, Any] = {
    "publish_every": ("batch", "1s", "40s", "never"),
    "weights_lag": ("20s",),
    "histories_lag": ("20s",),
    "keep_weights_every": "60s",
    "checkpoint_events": 200,
    "baselines": ("popularity", "cooccurrence", "item_knn", "river_mf"),
    "arms": (
        ArmConfig(name="retrained", kind="retrained", every="2m", window="4m"),
        ArmConfig(name="fine-tuned", kind="fine_tuned", every="50s", weights_lag="5s"),
        ArmConfig(name="sasrec", settings={"model": {"kind": "sasrec"}}),
        ArmConfig(
            name="ultra",
            settings={
                "model": {"kind": "ultra_hstu", "num_layers": 2, "local_attn_len": 2, "truncated_len": 4},
                "loss": {"stochastic_length_alpha": 1.5},
            },
        ),
        ArmConfig(
            name="ultra-mixture",
            settings={
                "model": {
                    "kind": "ultra_hstu",
                    "transducers": [
                        {"name": "clicks", "actions": ["click"], "max_len": 4},
                        {"name": "deeds", "actions": ["like", "purchase"], "num_layers": 1},
                    ],
                }
            },
        ),
        ArmConfig(
            name="ultra-fine-tuned",
            kind="fine_tuned",
            every="50s",
            settings={"model": {"kind": "ultra_hstu", "tokens": "interleaved", "local_attn_len": 1}},
        ),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunOutcome, Path]:
    """A run with every kind of online arm."""
    root = tmp_path_factory.mktemp("whole")
    return run(parts(root, walks(600), **EVERYTHING)), root


def test_two_runs_leave_the_same_bytes(tmp_path: Path, whole: tuple[RunOutcome, Path]) -> None:
    outcome, root = whole
    again = run(parts(tmp_path, walks(600), **EVERYTHING))
    assert without_cpu(again) == without_cpu(outcome)
    assert outcome.is_complete
    first = table_bytes(root)
    assert table_bytes(tmp_path) == first
    assert {"queries/part-00002.parquet", "ranks/online-40s/part-00000.parquet"} <= first.keys()
    assert [name for name in first if name.startswith("snapshots/")]


def test_another_seed_gives_other_weights_of_the_same_histories(tmp_path: Path) -> None:
    one, two = (
        run(parts(tmp_path / str(seed), walks(300), learner=with_seed(LEARNER, seed))).fingerprints for seed in (1, 2)
    )
    assert one["histories"] == two["histories"]
    assert one["weights"] != two["weights"]


@pytest.mark.parametrize("num_looks", [3, 31])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[RunOutcome, Path], num_looks: int
) -> None:
    outcome, root = whole
    stopped = run(parts(tmp_path, walks(600), stopping=stopped_after(num_looks), **EVERYTHING))
    assert not stopped.is_complete
    resumed = run(parts(tmp_path, walks(600), **EVERYTHING))
    assert without_cpu(resumed) == without_cpu(outcome)
    assert table_bytes(tmp_path) == table_bytes(root)


def test_the_arm_that_publishes_every_batch_is_the_trainers_own_test(tmp_path: Path) -> None:
    outcome = run(parts(tmp_path, walks(600), warm_up_share=0.0))
    ranks = table(tmp_path, "ranks/online-batch")["rank"].to_numpy()
    # Its first batch comes before evaluation begins.
    assert outcome.num_evaluated == len(ranks)
    popularity = table(tmp_path, "ranks/popularity")["rank"].to_numpy()
    assert RankMetrics.of_ranks(ranks[-200:]).hr_at_10 == pytest.approx(outcome.metrics["model.window.hr_at_10"])
    assert RankMetrics.of_ranks(popularity[-200:]).mrr == pytest.approx(outcome.metrics["popularity.window.mrr"])


def test_online_arms_answer_by_rows_of_the_precision_that_is_published(tmp_path: Path) -> None:
    found = {}
    for precision in ("float32", "int4"):
        learner = replace(LEARNER, trainer=replace(LEARNER.trainer, row_precision=precision))
        run(parts(tmp_path / precision, walks(300), learner=learner, publish_every=("batch", "40s")))
        found[precision] = {
            "ranks": table(tmp_path / precision, "ranks/online-40s")["rank"].to_numpy(),
            "every batch": table(tmp_path / precision, "ranks/online-batch")["rank"].to_numpy(),
            "bytes": table(tmp_path / precision, "publications")["num_bytes"].to_numpy(),
        }
    exact, rounded = found["float32"], found["int4"]
    assert (rounded["bytes"] < exact["bytes"]).all()
    for name in ("ranks", "every batch"):
        differ = (exact[name] != rounded[name]).mean()
        assert 0 < differ < 0.9, "rounded, and near"


def test_all_arms_answer_the_same_queries_in_the_same_order(whole: tuple[RunOutcome, Path]) -> None:
    _, root = whole
    events = table(root, "queries")["event"].to_list()
    assert events == sorted(events)
    arms = sorted(path.name for path in (root / "ranks").iterdir())
    assert len(arms) == 16
    for arm in arms:
        assert table(root, f"ranks/{arm}")["event"].to_list() == events, arm


def test_weights_are_as_old_as_their_interval_and_lag_say(whole: tuple[RunOutcome, Path]) -> None:
    _, root = whole
    published = table(root, "publications")
    queries = table(root, "queries")
    for arm, interval_ms, lag_ms in (
        ("online-batch", 0, 0),
        ("online-40s", 40_000, 0),
        ("weights-late-20s", 0, 20_000),
    ):
        times = published.filter(arm=arm)["time_ms"].to_numpy()
        assert (np.diff(times) >= interval_ms).all()
        shown = np.searchsorted(times + lag_ms, queries["event_time_ms"].to_numpy(), side="left") - 1
        assert table(root, f"ranks/{arm}")["version"].to_list() == shown.tolist(), arm
    assert len(published.filter(arm="online-never")) == 1


def test_arms_that_are_trained_in_batches_show_what_the_last_boundary_gave(whole: tuple[RunOutcome, Path]) -> None:
    _, root = whole
    published, asked_ms = table(root, "publications"), table(root, "queries")["event_time_ms"].to_numpy()
    for arm, every_ms, lag_ms in (("retrained", 120_000, 0), ("fine-tuned", 50_000, 5_000)):
        times = published.filter(arm=arm)["time_ms"].to_numpy()
        assert len(times) > 3
        assert (times % every_ms == 0).all()
        shown = np.searchsorted(times + lag_ms, asked_ms, side="left") - 1
        rows = table(root, f"ranks/{arm}")
        assert rows["version"].to_list() == shown.tolist(), arm
        ages = rows.filter(rows["version"] >= 0)["weights_age_ms"].to_numpy()
        assert ages.min() > 0
        ranks = rows.tail(200)["rank"].to_numpy()
        assert RankMetrics.of_ranks(ranks).mrr > 0.04  # type: ignore[operator]


def test_copies_and_stored_histories_rank_as_the_trainers_own_test(tmp_path: Path) -> None:
    """Waiting for late events asks replicas on histories read from the store; nothing is late, so answers are equal."""
    log = walks(500)
    # Histories that fit the model whole: a step reads max_len of a user, however many of its interactions it tests.
    learner = replace(LEARNER, model=replace(LEARNER.model, max_len=64))
    for name, late in (("own", "0s"), ("read", "5s")):
        run(parts(tmp_path / name, log, learner=learner, publish_every=("batch", "40s", "never"), late=late))
    for arm in ("online-batch", "online-40s", "online-never"):
        own, read = (table(tmp_path / name, f"ranks/{arm}") for name in ("own", "read"))
        assert own["version"].to_list() == read["version"].to_list()
        assert np.mean(own["rank"].to_numpy() == read["rank"].to_numpy()) > 0.99, arm
        own_lists, read_lists = (table(tmp_path / name, f"lists/{arm}") for name in ("own", "read"))
        assert own_lists["event"].to_list() == read_lists["event"].to_list()
        difference = own_lists["target_probability"].to_numpy() - read_lists["target_probability"].to_numpy()
        assert np.abs(difference).max() < 1e-3


def test_histories_that_are_late_hold_nothing_newer(whole: tuple[RunOutcome, Path]) -> None:
    _, root = whole
    ages = table(root, "ranks/histories-late-20s")["history_age_ms"].drop_nulls().to_numpy()
    assert ages.min() >= 20_000
    assert table(root, "ranks/online-batch")["history_age_ms"].to_numpy().min() < 20_000


def test_lists_hold_the_target_where_its_rank_says(whole: tuple[RunOutcome, Path]) -> None:
    _, root = whole
    lists = table(root, "lists/online-batch").join(table(root, "ranks/online-batch"), on="event")
    lists = lists.join(table(root, "queries").select("event", "item_id"), on="event")
    assert len(lists) > 80
    found = 0
    for row in lists.iter_rows(named=True):
        if row["rank"] <= len(row["item_ids"]):
            assert row["item_id"] == row["item_ids"][row["rank"] - 1]
            assert row["target_probability"] == pytest.approx(row["probabilities"][row["rank"] - 1], rel=1e-3)
            found += 1
        else:
            assert row["item_id"] not in row["item_ids"]
    assert found > 30


def test_a_batch_closes_when_its_first_event_has_waited(tmp_path: Path) -> None:
    run(parts(tmp_path, walks(300), batch_wait="3s"))
    published = table(tmp_path, "publications")
    assert np.diff(published["num_interactions"].to_numpy()).max() <= 6
    assert (np.diff(published["time_ms"].to_numpy()) < 5_000).all()


def test_clocks_of_producers_that_run_ahead_are_refused_as_live(tmp_path: Path) -> None:
    skewed = ArrivalConfig(clock_skew_ms=600_000)
    outcome = run(parts(tmp_path, walks(600), arrivals=skewed, late="1s"))
    assert 0 < outcome.counts["refused"] < 300
    assert outcome.counts["accepted"] == 600 - outcome.counts["refused"]


NUM_TARGETS = 1_000
NUM_ITEMS = 30


def hinted(*, num_users: int = 15) -> Log:
    """Items at random; 300 ms before each, an event happened that names it. In the second half it arrives too late."""
    rng = np.random.default_rng(5)
    users, targets = rng.integers(0, num_users, NUM_TARGETS), rng.integers(0, NUM_ITEMS, NUM_TARGETS)
    time_ms = START_MS + 1_000 * np.arange(NUM_TARGETS)
    hint_of = NUM_ITEMS + rng.permutation(NUM_ITEMS)
    happened = np.concatenate([time_ms, time_ms - 300])
    delay_ms = np.where(np.arange(NUM_TARGETS) < NUM_TARGETS // 2, 0, 5_000)
    arrived = np.concatenate([time_ms, time_ms - 300 + delay_ms])
    order = np.argsort(arrived, kind="stable")
    return Log(
        user_id=np.concatenate([users, users])[order],
        item_id=np.concatenate([targets, hint_of[targets]])[order],
        time_ms=happened[order],
        arrival_ms=arrived[order],
    )


def canary(root: Path) -> float:
    """HR@5 on targets whose hints come too late."""
    optimizer = replace(LEARNER.optimizer, row_learning_rate=0.05, dense_learning_rate=0.02)
    learner = replace(LEARNER, optimizer=optimizer, model=replace(LEARNER.model, trend_coefficient=0.0))
    run(parts(root, hinted(), learner=learner, late="10s", warm_up_share=0.55, poll_events=500))
    rows = table(root, "queries").join(table(root, "ranks/online-batch"), on="event")
    ranks = rows.filter(rows["item_id"] < NUM_ITEMS)["rank"].to_numpy()
    assert len(ranks) > 150
    return float((ranks[ranks < MISS_RANK] <= 5).mean())


def test_what_had_not_arrived_predicts_nothing(tmp_path: Path) -> None:
    assert canary(tmp_path) < 0.2


def test_the_canary_sings_when_histories_hold_what_had_not_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FeatureStore.read

    def leaking(self: FeatureStore, user_ids: Any, **options: Any) -> Any:
        return honest(self, user_ids, **(options | {"known_at_ms": None}))

    monkeypatch.setattr(FeatureStore, "read", leaking)
    assert canary(tmp_path) > 0.4
