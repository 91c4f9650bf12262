"""Users' vectors in a replay: as a daemon that keeps up would write them, the same in every run, and never of later."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backtest.arrivals import ArrivalConfig
from backtest.run import RunSettings
from backtest.run_config import BacktestConfig
from backtest.run_state import RunOutcome
from backtest.upstream_replay import UpstreamConfigs
from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from model.llatte_config import LlatteSettings
from model.ranking_model import upstream_model_config, with_ranking_head
from model.ranking_settings import RankingSettings
from model.upstream_config import UpstreamConfig
from online_trainer.learner_config import LearnerConfig
from online_trainer.upstream_settings import UpstreamDaemonConfig
from ops.backtest_run import vector_lines
from stream.events import EventRules
from tests.backtest.conftest import LEARNER, START_MS, Log, parts, run, stopped_after, walks, without_cpu

ACTIONS = EventRules().actions
RANKING = RankingSettings(
    kind="llatte",
    tasks=("value>=8",),
    learn_from="interactions",
    task_hidden_dim=8,
    row_learning_rate=3e-2,
    dense_learning_rate=3e-3,
)
UPSTREAM = UpstreamConfig(
    width=16,
    embedding_dim=8,
    num_layers=1,
    num_heads=2,
    latent_dim=8,
    head_dim=4,
    ffn_dim=16,
    num_queries=2,
    readout_rank=8,
    max_len=32,
    num_negatives=8,
    task_hidden_dim=8,
    max_items=1_000,
)
DAEMON = UpstreamDaemonConfig(
    debounce_ms=5_000,
    first_version_interactions=60,
    version_interactions=80,
    version_interval_s=30.0,
    batch_users=8,
    row_learning_rate=3e-2,
    dense_learning_rate=3e-3,
)
LLATTE = LlatteSettings(num_layers=1, num_heads=2, latent_dim=8, head_dim=4, ffn_dim=16)
CONFIGS = UpstreamConfigs(model=upstream_model_config(UPSTREAM, RANKING, ACTIONS), daemon=DAEMON)
EVERYTHING: dict[str, Any] = {"vectors_lag": ("0s", "20s", "never"), "checkpoint_events": 110}


def learner(max_len: int = 6) -> LearnerConfig:
    model = with_ranking_head(
        replace(LEARNER.model, max_len=max_len), RANKING, ACTIONS, LLATTE, upstream_width=UPSTREAM.width
    )
    return replace(LEARNER, model=model, ranking=RANKING, actions=ACTIONS)


def valued(log: Log) -> Log:
    return replace(log, value=np.where(log.item_id % 3 == 0, 9.0, 4.0))


def replayed(root: Path, log: Log, **options: Any) -> RunOutcome:
    given: dict[str, Any] = {"learner": learner(), "upstream": CONFIGS} | EVERYTHING | options
    return run(parts(root, log, **given))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunOutcome, Path]:
    root = tmp_path_factory.mktemp("whole")
    return replayed(root, valued(walks(300))), root


def stored(root: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(root / "store.db") as connection:
        query = "SELECT user_id, version, next_seq, as_of_ms, written_at_ms, vector FROM user_state ORDER BY 1, 2, 3"
        return connection.execute(query).fetchall()


def test_two_runs_compute_the_same_vectors_and_gains(whole: tuple[RunOutcome, Path], tmp_path: Path) -> None:
    outcome, root = whole
    assert without_cpu(replayed(tmp_path, valued(walks(300)))) == without_cpu(outcome)
    assert stored(tmp_path) == stored(root)
    upstream, gains = outcome.vectors["upstream"], outcome.vectors["gains"]["value>=8"]
    assert upstream["versions"] >= 2
    assert upstream["metrics"]["value>=8.lifetime.count"] > 0
    assert list(gains) == ["0s", "20s", "never"]
    (count,) = {found["count"] for found in gains.values()}
    assert 240 < count < 275, "the same labels, after a warm-up of a tenth and the batch in which it ends"
    assert upstream["found"]["0"]["found"] > upstream["found"]["20000"]["found"] > 0


@pytest.mark.parametrize("num_looks", [3, 16])
def test_a_run_that_was_stopped_goes_on_to_the_same_vectors(
    whole: tuple[RunOutcome, Path], tmp_path: Path, num_looks: int
) -> None:
    outcome, root = whole
    log = valued(walks(300))
    assert not replayed(tmp_path, log, stopping=stopped_after(num_looks)).is_complete
    assert without_cpu(replayed(tmp_path, log)) == without_cpu(outcome)
    assert stored(tmp_path) == stored(root)


def test_a_vector_is_made_of_exactly_what_had_arrived_when_it_was_due(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    log = valued(walks(400))
    # Bursts: several high-value events within a debounce, and users who come back after hours.
    log = replace(log, time_ms=START_MS + np.cumsum(rng.choice([100, 3_000, 40_000], 400)))
    replayed(tmp_path, log, checkpoint_events=10_000, vectors_lag=("0s",))
    rows = stored(tmp_path)
    assert len(rows) > 150
    for user_id, _, next_seq, as_of_ms, written_at_ms, _ in rows:
        arrived_ms = log.time_ms[(log.user_id == user_id) & (log.time_ms <= written_at_ms)]
        assert next_seq == len(arrived_ms)
        assert as_of_ms == arrived_ms[-1]


def test_a_debounce_makes_one_vector_of_a_burst(tmp_path: Path) -> None:
    found = {}
    for debounce_ms in (0, 60_000):
        configs = replace(CONFIGS, daemon=replace(DAEMON, debounce_ms=debounce_ms))
        outcome = replayed(tmp_path / str(debounce_ms), valued(walks(300)), upstream=configs, vectors_lag=("0s",))
        found[debounce_ms] = outcome.vectors["upstream"]["vectors"]
    assert found[60_000] < 0.7 * found[0]


def markers(num_events: int) -> Log:
    """One event in eight is with an item that says which of two kinds its user is of, which decides every value."""
    rng = np.random.default_rng(11)
    users = rng.integers(0, 40, num_events)
    kinds = users % 2
    items = np.where(rng.random(num_events) < 1 / 8, kinds, rng.integers(2, 12, num_events))
    return Log(
        user_id=users,
        item_id=items,
        time_ms=START_MS + 1_000 * np.arange(num_events),
        value=np.where(kinds == 1, 9.0, 4.0),
    )


@pytest.mark.slow
def test_what_only_long_histories_tell_reaches_the_ranker_by_vectors_and_less_of_it_late(tmp_path: Path) -> None:
    own = learner(max_len=2)
    outcome = replayed(
        tmp_path,
        markers(2_000),
        learner=replace(own, trainer=replace(own.trainer, spike_deviations=0.0)),
        upstream=UpstreamConfigs(
            model=replace(CONFIGS.model, upstream=replace(UPSTREAM, next_item_weight=0.0)),
            daemon=replace(DAEMON, first_version_interactions=800, version_interactions=10**6),
        ),
        vectors_lag=("0s", "10m", "never"),
        warm_up_share=0.6,
        checkpoint_events=10_000,
    )
    gains = outcome.vectors["gains"]["value>=8"]
    assert gains["0s"]["gain_percent"] > 5 * gains["0s"]["standard_error"]
    assert gains["0s"]["gain_percent"] > gains["10m"]["gain_percent"] > 0
    assert "gain_percent" not in gains["never"]
    lines = list(vector_lines(outcome.vectors))
    assert len(lines) == 4
    assert lines[1].startswith("  vectors 0s after they were computed")


def settings(**changes: Any) -> RunSettings:
    given: dict[str, Any] = {
        "backtest": BacktestConfig(publish_every=("batch",)),
        "arrivals": ArrivalConfig(),
        "rules": EventRules(),
        "store": FeatureStoreConfig(url="sqlite:///unused.db"),
        "hot": HotHistoriesConfig(),
        "learner": learner(),
        "upstream": CONFIGS,
    }
    return RunSettings(**(given | changes))


def test_settings_of_the_upstream_are_part_of_a_run_and_labels_cannot_be_learned_from_a_log() -> None:
    told = settings().as_dict()
    assert told["upstream_daemon"]["debounce_ms"] == 5_000
    assert told["upstream"]["upstream"]["width"] == 16
    labels = replace(learner(), ranking=replace(RANKING, learn_from="impressions"))
    with pytest.raises(ValueError, match=r"a recorded log holds no labels of impressions.*set interactions"):
        settings(learner=labels)


@pytest.mark.parametrize(
    ("lags", "sentence"),
    [
        ((), "name at least one"),
        (("0s", "0s"), "each once"),
        (("never", "0s"), "never must be the last"),
        (("soon",), "vectors_lag"),
    ],
)
def test_lags_that_make_no_sense_are_refused(lags: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BacktestConfig(publish_every=("batch",), vectors_lag=lags)
