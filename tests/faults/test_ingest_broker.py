"""Ingest while its broker is cut off, silent, restarted with its log, or restarted without it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.checker import check
from tests.faults.installation import Daemon, Installation
from tests.faults.load import Load
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

pytestmark = pytest.mark.timeout(240)

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
            HEADRACE_LOG__REQUEST_TIMEOUT_MS=f"{REQUEST_TIMEOUT_S * 1000:.0f}",
        ) as made,
    ):
        yield made


def become_not_ready(installation: Installation, ingest: Daemon, *words: str, timeout_s: float = 15) -> None:
    def says_so() -> bool:
        is_ready, why = ingest.readiness()
        return not is_ready and all(word in why for word in words)

    installation.wait(says_so, f"/readyz saying {words}", timeout_s=timeout_s)


def test_cut_off_from_the_broker_it_waits_and_goes_on(installation: Installation, broker: ProxiedBroker) -> None:
    with (
        PositionSampler(installation) as sampler,
        Load(broker.bootstrap_servers, seed=SEED, num_partitions=2, rate_per_s=600) as load,
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


def test_a_broker_that_stops_answering_is_waited_for(installation: Installation, broker: ProxiedBroker) -> None:
    with (
        PositionSampler(installation) as sampler,
        Load(broker.bootstrap_servers, seed=SEED + 1, num_partitions=2, rate_per_s=600) as load,
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
        Load(broker.bootstrap_servers, seed=SEED + 2, num_partitions=2, rate_per_s=2_000) as load,
        UpdatesReader(installation) as reader,
    ):
        ingest = installation.start_ready("ingest")
        time.sleep(1)
        load.pause()
        broker.proxy.cut()
        time.sleep(0.3)  # what the broker has received, it still handles
        durable = all_records(installation.kafka)
        assert sum(positions_of(installation).values()) < sum(
            ends_of(read_topic(installation.kafka, TOPICS.interactions)).values()
        ), "ingest was done before the cut: nothing was interrupted"
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
        print(ingest.process.returncode, ingest.said())
        assert 0
