"""Ingest while its PostgreSQL server is restarted in the middle of transactions, and while it does not answer."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.faults.postgres import OwnPostgres

pytestmark = pytest.mark.timeout(600)

SEED = 20_260_804
FROZEN_S = 7.0
"""Longer than `ingest.drain_timeout_ms`, after which a silent database makes ingest not ready."""


@pytest.fixture
def server() -> Iterator[OwnPostgres]:
    # Not tmp_path: the server runs as another user when we are root, and its socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="headrace-own-postgres-") as directory:
        Path(directory).chmod(0o755)
        with OwnPostgres(Path(directory)) as running:
            yield running


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker, server: OwnPostgres) -> Iterator[Installation]:
    with Installation(tmp_path, fresh_broker.bootstrap_servers, server.url, num_partitions=2) as made:
        yield made


def wait_for_more_batches(installation: Installation, ingest: Daemon) -> None:
    num_before = ingest.status()["batches"]
    installation.wait(lambda: ingest.status()["batches"] > num_before, "work between two restarts")


def restart_at_random_moments(installation: Installation, server: OwnPostgres, *, num_restarts: int, seed: int) -> None:
    moments = random.Random(seed)
    with (
        PositionSampler(installation) as sampler,
        Load(
            installation.kafka.bootstrap_servers,
            seed=seed,
            num_partitions=2,
            rate_per_s=1_200,
            num_applied=sampler.num_applied,
        ) as load,
    ):
        ingest = installation.start_ready("ingest")
        for _ in range(num_restarts):
            wait_for_more_batches(installation, ingest)
            time.sleep(moments.uniform(0, 1))
            server.stop_immediately()
            installation.wait(lambda: not ingest.readiness()[0], f"seed {seed}: ingest noticing the stop")
            assert "PostgreSQL" in ingest.readiness()[1]
            time.sleep(moments.uniform(0, 1))
            server.start()
        installation.wait(lambda: ingest.readiness()[0], "readiness after the last restart")
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=seed)
        ingest.stop()
    assert "Traceback" not in ingest.said()


def test_a_database_restarted_in_the_middle_of_transactions_is_waited_for(
    installation: Installation, server: OwnPostgres
) -> None:
    restart_at_random_moments(installation, server, num_restarts=3, seed=SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_database_restarted_many_times_is_waited_for(installation: Installation, server: OwnPostgres) -> None:
    restart_at_random_moments(installation, server, num_restarts=20, seed=SEED + 1)


def test_a_database_that_stops_answering_makes_it_not_ready_and_is_waited_for(
    installation: Installation, server: OwnPostgres
) -> None:
    with Load(installation.kafka.bootstrap_servers, seed=SEED + 2, num_partitions=2) as load:
        ingest = installation.start_ready("ingest")
        installation.wait_for_a_batch(ingest)
        server.freeze()
        try:
            time.sleep(FROZEN_S)
            is_ready, why = ingest.readiness()
        finally:
            server.thaw()
        assert not is_ready
        assert "the feature store has not answered for" in why
        installation.wait(lambda: ingest.readiness()[0], "readiness after the silence")
        load.stop()
        assert_exactly_once(installation, load.truth, seed=SEED + 2)
        ingest.stop()
    assert "Traceback" not in ingest.said()
