"""SIGKILL of the upstream daemon at each fail point, with a real broker, a real database and real processes.

In the end every user has the vector of its whole history, made by the version in effect: computed anew and compared.
Every label has been learned from once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.ranking_model import upstream_model_config
from model.ranking_settings import RankingSettings
from model.snapshot import load_snapshot
from model.swap import apply_snapshot
from model.upstream_config import UpstreamConfig, UpstreamModelConfig
from model.upstream_model import UpstreamModel
from online_trainer.vector_batches import compute
from ops.local_broker import LocalBroker
from stream.events import EventRules
from tests.faults.installation import Daemon
from tests.feature_store.databases import migrated_database
from tests.ops.test_kill import LearningInstallation, ingest_everything
from tests.ops.test_kill_labels import ITEMS, NUM_LABELS, write_labels

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

UPSTREAM = {
    "WIDTH": 8,
    "EMBEDDING_DIM": 8,
    "NUM_LAYERS": 1,
    "NUM_HEADS": 1,
    "LATENT_DIM": 4,
    "HEAD_DIM": 4,
    "FFN_DIM": 8,
    "NUM_QUERIES": 2,
    "READOUT_RANK": 4,
    "MAX_LEN": 24,
    "NUM_NEGATIVES": 16,
    "TASK_HIDDEN_DIM": 4,
}
NUM_USERS = 40


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def installation(
    request: pytest.FixtureRequest, tmp_path: Path, fresh_broker: LocalBroker
) -> Iterator[LearningInstallation]:
    with (
        migrated_database(request.param, tmp_path) as url,
        LearningInstallation(tmp_path, fresh_broker, url) as made,
    ):
        made.environment |= {
            "HEADRACE_RANKING__TASKS": '["rating"]',
            "HEADRACE_RANKING__BATCH_ITEMS": "16",
            "HEADRACE_UPSTREAM_DAEMON__DEBOUNCE_MS": "50",
            "HEADRACE_UPSTREAM_DAEMON__BATCH_USERS": "8",
            "HEADRACE_UPSTREAM_DAEMON__FIRST_VERSION_INTERACTIONS": "300",
            "HEADRACE_UPSTREAM_DAEMON__VERSION_INTERACTIONS": "300",
            "HEADRACE_UPSTREAM_DAEMON__VERSION_INTERVAL_S": "0",
            "HEADRACE_UPSTREAM_DAEMON__CHECKPOINT_INTERVAL_S": "0.3",
            "HEADRACE_UPSTREAM_DAEMON__LEARN_SHARE": "1",
            **{f"HEADRACE_UPSTREAM__{name}": str(value) for name, value in UPSTREAM.items()},
        }
        yield made


def model_config() -> UpstreamModelConfig:
    sizes: dict[str, Any] = {name.lower(): value for name, value in UPSTREAM.items()}
    return upstream_model_config(UpstreamConfig(**sizes), RankingSettings(tasks=("rating",)), EventRules().actions)


def is_up_to_date(daemon: Daemon, *, interactions: int) -> bool:
    status = daemon.status()
    if not status or status["learning"]["interactions"] < interactions:
        return False
    return status["version"] is not None and status["filling"] is None and status["waiting"] == 0


def assert_every_vector_is_right(installation: LearningInstallation) -> None:
    states = installation.store.user_states
    users = states.users_after(-1, limit=1_000)
    assert len(users) == NUM_USERS
    found = states.newest("default", users, width=UPSTREAM["WIDTH"])
    current = installation.store.read_current(users, max_len=UPSTREAM["MAX_LEN"])
    assert found.is_there.all()
    np.testing.assert_array_equal(found.next_seq, current.next_seq)
    (version,) = set(found.version.tolist())
    model = UpstreamModel(model_config())
    apply_snapshot(model, load_snapshot(installation.root / "snapshots", "default-upstream", version))
    expected = compute(model, version, current, max_tokens=10**6).vectors
    np.testing.assert_allclose(found.vector, expected.vector, rtol=1e-4, atol=1e-5)


def test_killed_while_it_learns_and_releases_a_version_it_serves_one_that_is_whole(
    installation: LearningInstallation,
) -> None:
    installation.send(400)
    ingest_everything(installation)
    for fail_point in (
        "upstream.learned:2",
        "upstream.version_written",
        "upstream.version_begun",
        "upstream.written:3",
        "upstream.version_served",
    ):
        installation.start("upstream", fail_point=fail_point).expect_kill(fail_point)
    daemon = installation.start("upstream")
    installation.wait(lambda: is_up_to_date(daemon, interactions=400), "computing every vector")
    daemon.stop()
    assert_every_vector_is_right(installation)


def test_killed_between_labels_it_learns_each_of_them_once(installation: LearningInstallation) -> None:
    installation.send(400)
    ingest_everything(installation)
    write_labels(installation)
    for fail_point in ("upstream.labels_learned:3", "trainer.checkpoint_written:1", "upstream.labels_learned:5"):
        installation.start("upstream", fail_point=fail_point).expect_kill(fail_point)
    daemon = installation.start("upstream")

    def labels() -> dict[str, Any]:
        return (daemon.status() or {"learning": {}})["learning"].get("labels") or {}

    installation.wait(lambda: labels().get("learned") == ITEMS * NUM_LABELS, "learning every label")
    installation.wait(lambda: is_up_to_date(daemon, interactions=400), "computing every vector")
    assert labels()["repeated"] == ITEMS * NUM_LABELS // 5
    assert daemon.status()["label_feed"] == {"pending": 0, "unreadable": 0, "forgotten": 0, "lost": 0}
    assert daemon.status()["metrics"]["rating.lifetime.count"] == ITEMS * NUM_LABELS
    daemon.stop()
    assert_every_vector_is_right(installation)


def test_killed_at_each_step_of_writing_it_writes_every_vector(installation: LearningInstallation) -> None:
    installation.send(400)
    ingest_everything(installation)
    daemon = installation.start("upstream")
    installation.wait(lambda: is_up_to_date(daemon, interactions=400), "computing every vector")
    daemon.kill()
    # With a version in effect: events arrive, their vectors follow, whatever kills the daemon in between.
    installation.send(200)
    ingest_everything(installation)
    for fail_point in ("upstream.computed", "upstream.written", "upstream.committed"):
        installation.start("upstream", fail_point=fail_point).expect_kill(fail_point)
    daemon = installation.start("upstream")
    installation.wait(lambda: is_up_to_date(daemon, interactions=600), "computing every vector again")
    assert daemon.readiness() == (True, "ready")
    assert daemon.metric("headrace_upstream_waiting") == 0
    daemon.stop()
    assert_every_vector_is_right(installation)
