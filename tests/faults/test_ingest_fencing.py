"""Two ingest processes and one partition: the locked position decides; a revoked partition is drained or abandoned."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Installation
from tests.faults.load import Load
from tests.faults.locks import writers_kept_waiting
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import Backend, migrated_database

pytestmark = pytest.mark.timeout(600)

SEED = 20_260_808
ABANDONS = "partitions revoked while a batch is still being committed"


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_two_workers_that_both_own_a_partition_fence_each_other(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    with (
        migrated_database(backend, tmp_path) as url,
        Installation(tmp_path, fresh_broker.bootstrap_servers, url) as installation,
        PositionSampler(installation) as sampler,
        Load(fresh_broker.bootstrap_servers, seed=SEED, rate_per_s=500, num_applied=sampler.num_applied) as load,
    ):
        # Two groups: the broker gives the partition to both.
        left = installation.start("ingest", HEADRACE_INGEST__GROUP_ID="left")
        right = installation.start("ingest", HEADRACE_INGEST__GROUP_ID="right")

        def both_met() -> bool:
            did = [worker.status() for worker in (left, right)]
            return all(one.get("accepted", 0) > 0 and one.get("skipped", 0) > 0 for one in did)

        installation.wait(both_met, "both workers applying some records and dropping what the other applied")
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=SEED)
        accepted = left.status()["accepted"] + right.status()["accepted"]
        assert accepted == installation.store.totals().num_interactions
        left.stop()
        right.stop()


@pytest.mark.parametrize(
    ("drain_timeout_ms", "drains"), [("30000", True), ("300", False)], ids=["drained", "abandoned"]
)
def test_a_partition_revoked_with_a_transaction_open(
    drain_timeout_ms: str, drains: bool, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    with (
        migrated_database("postgresql", tmp_path) as url,
        Installation(
            tmp_path,
            fresh_broker.bootstrap_servers,
            url,
            num_partitions=2,
            settings={
                "HEADRACE_INGEST__DRAIN_TIMEOUT_MS": drain_timeout_ms,
                # The second that is usual here would have the broker give up on a member that drains for longer.
                "HEADRACE_INGEST__SESSION_TIMEOUT_MS": "6000",
            },
        ) as installation,
        Load(fresh_broker.bootstrap_servers, seed=SEED + 1, num_partitions=2) as load,
    ):
        first = installation.start_ready("ingest")
        installation.wait_for_a_batch(first)
        with writers_kept_waiting(url):
            second = installation.start("ingest")
            if drains:
                installation.wait(lambda: "Starting" in second.said(), "the second worker joining")
            else:
                installation.wait(lambda: ABANDONS in first.said(), "the first worker abandoning its batch")
        installation.wait(
            lambda: [len(worker.status().get("positions", ())) for worker in (first, second)] == [1, 1],
            "each worker having one partition",
        )
        load.stop()
        assert_exactly_once(installation, load.truth, seed=SEED + 1)
        assert (ABANDONS in first.said()) is not drains
        first.stop()
        second.stop()
