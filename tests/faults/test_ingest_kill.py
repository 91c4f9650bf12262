"""SIGKILL of ingest at random moments under load."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Installation
from tests.faults.load import Load
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import Backend, migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

BACKENDS: tuple[Backend, ...] = ("sqlite", "postgresql")
SEED = 20_260_801


def kill_at_random_moments(backend: Backend, root: Path, broker: LocalBroker, *, num_kills: int, seed: int) -> None:
    moments = random.Random(seed)
    with (
        migrated_database(backend, root) as url,
        Installation(root, broker.bootstrap_servers, url, num_partitions=2) as installation,
        PositionSampler(installation) as sampler,
        Load(broker.bootstrap_servers, seed=seed, num_partitions=2, num_applied=sampler.num_applied) as load,
    ):
        for number in range(num_kills):
            ingest = installation.start("ingest")
            # Every fourth is killed while it starts or joins, the others while they work.
            if number % 4:
                installation.wait_for_a_batch(ingest)
            time.sleep(moments.uniform(0, 1.5) if number % 4 else moments.uniform(0, 5))
            assert ingest.is_running, f"seed {seed}: {ingest.said()}"
            ingest.kill()
        survivor = installation.start("ingest")
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=seed)
        survivor.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_at_random_moments_it_loses_and_doubles_nothing(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    kill_at_random_moments(backend, tmp_path, fresh_broker, num_kills=4, seed=SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_many_times_it_loses_and_doubles_nothing(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    kill_at_random_moments(backend, tmp_path, fresh_broker, num_kills=25, seed=SEED + 1)
