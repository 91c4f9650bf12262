"""Ingest while its broker is cut off, silent, restarted with its log, or restarted without it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.checker import check, read_histories, row_of
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load, Truth
from tests.faults.observing import (
    TOPICS,
    PositionSampler,
    UpdatesReader,
    all_records,
    assert_exactly_once,
    ends_of,
    observe,
    positions_of,
    read_topic,
    refill,
    wait_until_applied,
)
from tests.faults.proxy import ProxiedBroker
from tests.feature_store.databases import migrated_database

pytestmark = pytest.mark.timeout(600)

REQUEST_TIMEOUT_S = 2.0
SEED = 20_260_802


@pytest.fixture
def broker() -> Iterator[ProxiedBroker]:
    with ProxiedBroker() as running:
        yield running


@pytest.fixture
def installation(tmp_path: Path, broker: ProxiedBroker) -> Iterator[Installation]:
    with (
        migrated_database("sqlite", tmp_path) as url,
        Installation(
            tmp_path,
            broker.bootstrap_servers,
            url,
            num_partitions=2,
            settings={"HEADRACE_LOG__REQUEST_TIMEOUT_MS": f"{REQUEST_TIMEOUT_S * 1000:.0f}"},
        ) as made,
    ):
        yield made


def become_not_ready(installation: Installation, ingest: Daemon, *words: str, timeout_s: float = 60) -> None:
    def says_so() -> bool:
        is_ready, why = ingest.readiness()
        return not is_ready and all(word in why for word in words)

    installation.wait(says_so, f"/readyz saying {words}", timeout_s=timeout_s)


def test_cut_off_from_the_broker_it_waits_and_goes_on(installation: Installation, broker: ProxiedBroker) -> None:
    with (
        PositionSampler(installation) as sampler,
        Load(
            broker.bootstrap_servers, seed=SEED, num_partitions=2, rate_per_s=600, num_applied=sampler.num_applied
        ) as load,
    ):
        ingest = installation.start_ready("ingest")
        time.sleep(1)
        broker.proxy.refuse()
        become_not_ready(installation, ingest, "the broker")
        time.sleep(2)
        broker.proxy.restore()
        installation.wait(lambda: ingest.readiness()[0], "readiness after the outage")
        time.sleep(1)
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=SEED)
    ingest.stop()
    assert "Traceback" not in ingest.said()
    # The client library alone would write a hundred lines a second.
    assert len(ingest.said().splitlines()) < 150, ingest.said()


def test_a_broker_that_stops_answering_is_waited_for(installation: Installation, broker: ProxiedBroker) -> None:
    with (
        PositionSampler(installation) as sampler,
        Load(
            broker.bootstrap_servers, seed=SEED + 1, num_partitions=2, rate_per_s=600, num_applied=sampler.num_applied
        ) as load,
    ):
        ingest = installation.start_ready("ingest")
        time.sleep(1)
        pid = broker.broker.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            become_not_ready(installation, ingest, "the broker")
            time.sleep(1.5 * REQUEST_TIMEOUT_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        installation.wait(lambda: ingest.readiness()[0], "readiness after the silence")
        time.sleep(1)
        load.stop()
        assert_exactly_once(installation, load.truth, sampler, seed=SEED + 1)
    ingest.stop()
    assert "Traceback" not in ingest.said()


def test_a_broker_restarted_with_its_log_is_read_on_from_the_stored_position(
    installation: Installation, broker: ProxiedBroker
) -> None:
    with (
        PositionSampler(installation) as sampler,
        Load(
            broker.bootstrap_servers, seed=SEED + 2, num_partitions=2, rate_per_s=5_000, num_applied=sampler.num_applied
        ) as load,
        UpdatesReader(installation) as reader,
    ):
        ingest = installation.start_ready("ingest")
        time.sleep(1)
        load.pause()
        broker.proxy.cut()
        time.sleep(0.3)  # what the broker has received, it still handles
        durable = all_records(installation.kafka)
        num_sent = sum(ends_of(read_topic(installation.kafka, TOPICS.interactions)).values())
        assert sum(positions_of(installation).values()) < num_sent, "ingest was done before the cut"
        broker.replace()
        refill(installation.kafka, durable)
        broker.proxy.restore()
        load.resume()
        time.sleep(2)
        load.stop()
        log = wait_until_applied(installation)
        # What a reader saw that lived through the restart, not what one sees that comes later.
        observed = replace(observe(installation, load.truth, log, sampler), updates=reader.catch_up())
        verdict = check(load.truth, observed)
        assert not verdict.problems, verdict.problems
    ingest.stop()
    assert "Traceback" not in ingest.said()


def test_a_broker_that_comes_back_empty_is_refused(installation: Installation, broker: ProxiedBroker) -> None:
    with Load(broker.bootstrap_servers, seed=SEED + 3, num_partitions=2) as load:
        ingest = installation.start_ready("ingest")
        time.sleep(1)
        load.stop()
        log = wait_until_applied(installation)
        before = observe(installation, load.truth, log)
        assert not check(load.truth, before).problems
        broker.proxy.cut()
        broker.replace()
        refill(installation.kafka, [])
        broker.proxy.restore()
        installation.wait(lambda: not ingest.is_running, "the refusal")
        assert ingest.process.returncode == 2
        last_line = ingest.said().splitlines()[-1]
        assert "interactions/" in last_line
        assert "was reset: offset " in last_line
        assert "the log ends at offset 0: " in last_line
        assert "headrace log accept --reset" in last_line
        # Nothing was touched: what was stored is stored, and so is where it ended.
        assert read_histories(installation.store, load.truth) == before.histories
        assert positions_of(installation) == before.positions
    # Under the name of a new log the same store goes on with the new records, and drops those it holds already.
    again = Load(broker.bootstrap_servers, seed=SEED + 3, num_partitions=2)
    with again:
        reborn = installation.start_ready("ingest", HEADRACE_LOG__LOG_ID="second")
        installation.wait_for_a_batch(reborn)
        again.stop()
        ends = ends_of(read_topic(installation.kafka, TOPICS.interactions))
        installation.wait(
            lambda: installation.store.positions("second", TOPICS.interactions) == ends, "applying the new log"
        )
        reborn.stop()
    both = Truth(valid=load.truth.valid | again.truth.valid)
    stored = Counter(row for history in read_histories(installation.store, both).values() for row, _ in history)
    assert stored == Counter({row_of(event) for event in both.valid.values()})
