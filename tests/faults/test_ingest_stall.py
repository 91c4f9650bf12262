"""Ingest under load while the database keeps it waiting: bounded memory, probes that tell the truth, nothing lost."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from ops.local_broker import LocalBroker
from tests.faults.installation import Installation
from tests.faults.load import Load
from tests.faults.locks import writers_kept_waiting
from tests.faults.observing import PositionSampler, assert_exactly_once
from tests.feature_store.databases import Backend, migrated_database

pytestmark = pytest.mark.timeout(600)

SEED = 20_260_805
PADDING_BYTES = 6_000
RATE_PER_S = 500
BATCH = 500
GROWTH_BYTES_MAX = 16 * 2**20
"""Two partitions may each hold a fetch of `log.max_message_bytes`, raw and decoded; the rest is room for the allocator.
The short stall sends 24 MB, so that keeping it all would show."""


def stall(backend: Backend, root: Path, broker: LocalBroker, *, stall_s: float, seed: int) -> None:
    with (
        migrated_database(backend, root) as url,
        Installation(
            root,
            broker.bootstrap_servers,
            url,
            num_partitions=2,
            settings={
                "HEADRACE_INGEST__MAX_BATCH_RECORDS": str(BATCH),
                "HEADRACE_LOG__MAX_MESSAGE_BYTES": str(2**20),
            },
        ) as installation,
        PositionSampler(installation) as sampler,
        nullcontext(installation.start_ready("ingest")) as ingest,  # before the load: a slow start would be a backlog
        Load(
            broker.bootstrap_servers, seed=seed, num_partitions=2, rate_per_s=RATE_PER_S, padding_bytes=PADDING_BYTES
        ) as load,
    ):
        installation.wait(lambda: ingest.status()["lag"] < 2 * RATE_PER_S, "catching up with the load")
        with writers_kept_waiting(url):
            started_s = time.monotonic()
            before, positions = ingest.rss_bytes(), ingest.status()["positions"]
            rss, lags = [], []
            while time.monotonic() < started_s + stall_s:
                time.sleep(0.5)
                rss.append(ingest.rss_bytes())
                lags.append(ingest.metric("headrace_ingest_lag"))
            is_ready, why = ingest.readiness()
            stalled_at = ingest.status()["positions"]
            num_waiting = ingest.status()["lag"]
        assert not is_ready
        assert "feature store" in why
        assert sum(stalled_at.values()) - sum(positions.values()) <= BATCH, "batches were committed through the lock"
        # Lag is exported and grows with what is sent: half of the rate, for a machine that is busy.
        assert lags[-1] - lags[0] > 0.5 * RATE_PER_S * (stall_s - 2), f"seed {seed}: lag {lags}"
        assert num_waiting >= lags[-1]
        growth = max(rss) - before
        assert growth < GROWTH_BYTES_MAX, f"seed {seed}: grew by {growth:,} bytes: {rss}"
        installation.wait(lambda: ingest.readiness()[0], "readiness after the stall")
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=seed, timeout_s=600)
        ingest.stop()
    assert "Traceback" not in ingest.said()


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_stalled_database_holds_it_up_without_filling_its_memory(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    stall(backend, tmp_path, fresh_broker, stall_s=8, seed=SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_database_stalled_for_a_minute_does_so_no_more(
    backend: Backend, tmp_path: Path, fresh_broker: LocalBroker
) -> None:
    stall(backend, tmp_path, fresh_broker, stall_s=60, seed=SEED + 1)
