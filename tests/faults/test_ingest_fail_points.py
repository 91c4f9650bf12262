"""SIGKILL of ingest at each numbered step of the commit, one after the other, under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from stream.failpoints import FAIL_POINTS
from tests.faults.installation import Installation
from tests.faults.load import Load
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import Backend, migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

SEED = 20_260_803
INGEST_FAIL_POINTS = [name for name in FAIL_POINTS if name.startswith("ingest.")]


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_killed_at_each_step_of_the_commit_it_loses_and_doubles_nothing(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    with (
        migrated_database(backend, tmp_path) as url,
        Installation(tmp_path, fresh_broker.bootstrap_servers, url) as installation,
        PositionSampler(installation) as sampler,
        Load(fresh_broker.bootstrap_servers, seed=SEED, num_applied=sampler.num_applied) as load,
    ):
        for number, name in enumerate(INGEST_FAIL_POINTS):
            # The first, the second and the third time, so that an empty and a running store are both met.
            fail_point = f"{name}:{1 + number % 3}"
            installation.start("ingest", fail_point=fail_point).expect_kill(fail_point)
        survivor = installation.start("ingest")
        load.stop()
        verdict = assert_exactly_once(installation, load.truth, sampler, seed=SEED)
        survivor.stop()
    # Two of the steps lie after the sending and before the commit.
    assert verdict.num_rows_sent_again > 0, "no crash made ingest send anything again"
    assert verdict.num_refused > 0
