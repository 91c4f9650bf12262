"""Ingest processes that come and go, meet on one partition, and lose one with a transaction open."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import Backend, migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

SEED = 20_260_807
WORKERS_MAX = 4


def storm(backend: Backend, root: Path, broker: LocalBroker, *, num_changes: int, seed: int) -> None:
    """Join, leave and die at random for a while; then one worker has to finish the rest."""
    fate = random.Random(seed)
    with (
        migrated_database(backend, root) as url,
        Installation(root, broker.bootstrap_servers, url, num_partitions=4) as installation,
        PositionSampler(installation) as sampler,
        Load(
            broker.bootstrap_servers, seed=seed, num_partitions=4, rate_per_s=200, num_applied=sampler.num_applied
        ) as load,
    ):
        workers = [installation.start("ingest"), installation.start("ingest")]
        leaving: list[Daemon] = []
        for _ in range(num_changes):
            time.sleep(fate.uniform(1, 3))
            change = fate.choice(("join", "leave", "die"))
            if (change == "join" and len(workers) < WORKERS_MAX) or len(workers) == 1:
                workers.append(installation.start("ingest"))
            elif change == "leave":
                leaving.append(workers.pop(fate.randrange(len(workers))))
                leaving[-1].process.terminate()
            else:
                workers.pop(fate.randrange(len(workers))).kill()
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=seed)
        for worker in leaving:
            worker.process.wait(60)
        for worker in workers:
            assert worker.is_running, f"seed {seed}: {worker.said()}"
            worker.stop()


def test_workers_that_come_and_go_lose_and_double_nothing(tmp_path: Path, fresh_broker: LocalBroker) -> None:
    storm("postgresql", tmp_path, fresh_broker, num_changes=6, seed=SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_workers_that_come_and_go_for_long_lose_and_double_nothing(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    storm(backend, tmp_path, fresh_broker, num_changes=40, seed=SEED + 1)
