"""The trainer in the middle of a run while its broker or its database goes away and comes back.

Ingest runs beside it under load, so that there is always something that has just been announced and not yet committed.
Afterwards `headrace verify` says whether each stored interaction is in the newest weights exactly once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load
from tests.faults.observing import all_records, refill, wait_until_applied
from tests.faults.postgres import OwnPostgres
from tests.faults.proxy import ProxiedBroker
from tests.feature_store.databases import migrated_database

pytestmark = pytest.mark.timeout(600)

SEED = 20_261_128
RATE_PER_S = 250
SETTINGS = {
    "HEADRACE_LOG__REQUEST_TIMEOUT_MS": "2000",
    # Few histories fit, so that the trainer needs the database all the time.
    "HEADRACE_HOT__MAX_LEN": "32",
    "HEADRACE_HOT__BUDGET_BYTES": "65536",
    "HEADRACE_TRAINER__BATCH_INTERACTIONS": "32",
    "HEADRACE_TRAINER__BATCH_WAIT_MS": "100",
    "HEADRACE_TRAINER__CHECKPOINT_INTERVAL_S": "0.5",
    "HEADRACE_TRAINER__PUBLISH_INTERVAL_MS": "200",
    "HEADRACE_MODEL__EMBEDDING_DIM": "16",
    "HEADRACE_MODEL__NUM_HEADS": "1",
    "HEADRACE_MODEL__ATTENTION_DIM": "8",
    "HEADRACE_MODEL__HIDDEN_DIM": "8",
    "HEADRACE_MODEL__MAX_LEN": "16",
}


@pytest.fixture
def proxied() -> Iterator[ProxiedBroker]:
    with ProxiedBroker() as running:
        yield running


@pytest.fixture
def server() -> Iterator[OwnPostgres]:
    # Not tmp_path: the server runs as another user when we are root, and its socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="headrace-own-postgres-") as directory:
        Path(directory).chmod(0o755)
        with OwnPostgres(Path(directory)) as running:
            yield running


def learned(trainer: Daemon) -> int:
    return int(trainer.status().get("interactions", 0))


def wait_for_more(installation: Installation, trainer: Daemon) -> None:
    before = learned(trainer)
    installation.wait(lambda: learned(trainer) > before + 64, "learning between two outages")


def assert_learned_exactly_once(installation: Installation, ingest: Daemon, trainer: Daemon) -> None:
    """Once the stream has ended: everything ingested, everything learned, and the account right."""
    wait_until_applied(installation)
    num_stored = installation.store.totals().num_interactions
    assert num_stored > 500
    installation.wait(lambda: learned(trainer) == num_stored, "learning everything")
    status: dict[str, Any] = trainer.status()
    assert status["fingerprint"] == str(installation.store.totals().fingerprint)
    assert status["supervised"] + status["first"] + status["out_of_reach"] + status["quarantined"] == num_stored
    for daemon in (ingest, trainer):
        daemon.stop()
        assert "Traceback" not in daemon.said()
    verified = subprocess.run(
        [sys.executable, "-m", "ops", "verify"],
        env=installation.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"each of the {num_stored:,} stored interactions exactly once" in verified.stdout


def test_a_broker_restarted_with_its_log_in_the_middle_of_a_run_costs_nothing(
    tmp_path: Path, proxied: ProxiedBroker
) -> None:
    with (
        migrated_database("sqlite", tmp_path) as url,
        Installation(tmp_path, proxied.bootstrap_servers, url, num_partitions=2, settings=SETTINGS) as installation,
        Load(proxied.bootstrap_servers, seed=SEED, num_partitions=2, rate_per_s=RATE_PER_S) as load,
    ):
        ingest, trainer = installation.start_ready("ingest"), installation.start_ready("train")
        wait_for_more(installation, trainer)
        load.pause()
        proxied.proxy.cut()
        time.sleep(0.3)  # what the broker has received, it still handles
        durable = all_records(installation.kafka)
        installation.wait(lambda: "the broker" in trainer.readiness()[1], "the trainer noticing the outage")
        proxied.replace()
        refill(installation.kafka, durable)
        proxied.proxy.restore()
        load.resume()
        installation.wait(lambda: trainer.readiness()[0], "readiness after the outage")
        wait_for_more(installation, trainer)
        load.stop()
        assert_learned_exactly_once(installation, ingest, trainer)


@pytest.mark.slow
def test_a_database_restarted_in_the_middle_of_a_run_costs_nothing(
    tmp_path: Path, fresh_broker: LocalBroker, server: OwnPostgres
) -> None:
    with (
        Installation(
            tmp_path, fresh_broker.bootstrap_servers, server.url, num_partitions=2, settings=SETTINGS
        ) as installation,
        Load(fresh_broker.bootstrap_servers, seed=SEED + 1, num_partitions=2, rate_per_s=RATE_PER_S) as load,
    ):
        ingest, trainer = installation.start_ready("ingest"), installation.start_ready("train")
        for _ in range(2):
            wait_for_more(installation, trainer)
            server.stop_immediately()
            installation.wait(lambda: "PostgreSQL" in trainer.readiness()[1], "the trainer noticing the stop")
            server.start()
            installation.wait(lambda: trainer.readiness()[0], "readiness after the restart")
        wait_for_more(installation, trainer)
        load.stop()
        assert_learned_exactly_once(installation, ingest, trainer)
