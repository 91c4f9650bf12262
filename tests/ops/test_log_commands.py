"""`headrace log`: what is lost is said, nothing changes without --yes, and afterwards the whole loop goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from feature_store import schema
from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from ops.errors import OpsError
from ops.local_broker import LocalBroker
from ops.log_positions import accept_reset, accept_truncated, read_status
from stream.clock import ManualClock
from stream.memory_log import MemoryLog
from tests.faults.installation import Daemon
from tests.feature_store.databases import migrated_database
from tests.ops.command_line import Headrace, assert_refused
from tests.ops.test_kill import LearningInstallation


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    url = f"sqlite:///{tmp_path}/store.db"
    schema.migrate(url)
    store = FeatureStore(FeatureStoreConfig(url=url))
    yield store
    store.close()


@pytest.fixture
async def log() -> MemoryLog:
    """Two partitions of ten records each."""
    log = MemoryLog(ManualClock(1_000), num_partitions=2, log_id="main")
    await log.create_topics()
    for partition in (0, 1):
        for _ in range(10):
            log.append(log.topics.interactions, partition, None, b"x", ())
    return log


def stand_at(store: FeatureStore, log_id: str, positions: dict[int, int]) -> None:
    with store.transaction() as transaction:
        for partition, position in positions.items():
            transaction.lock_position(log_id, "interactions", partition)
            transaction.set_position(log_id, "interactions", partition, position)


async def test_status_says_where_each_partition_stands(log: MemoryLog, store: FeatureStore) -> None:
    stand_at(store, "main", {0: 4})
    log.delete_before(("interactions", 1), 3)
    status = await read_status(log, store)
    assert status.is_whole
    assert status.rows() == [
        {"partition": 0, "position": 4, "start": 0, "end": 10, "lag": 6, "verdict": "whole"},
        {"partition": 1, "position": None, "start": 3, "end": 10, "lag": 7, "verdict": "whole"},
    ]
    log.delete_before(("interactions", 0), 6)
    status = await read_status(log, store)
    assert not status.is_whole
    assert status.to_text().splitlines()[0] == "log 'main', topic interactions"
    assert status.to_text().splitlines()[2].split() == ["0", "4", "6", "10", "4", "truncated"]


async def test_what_was_truncated_is_given_up_on_yes_alone_and_once(log: MemoryLog, store: FeatureStore) -> None:
    stand_at(store, "main", {0: 4, 1: 5})
    log.delete_before(("interactions", 0), 6)
    log.append(log.topics.history_updates, 1, None, b"x", ())
    log.delete_before((log.topics.history_updates, 1), 1)
    expected = "interactions/0: 2 events, offsets 4 to 5, are given up; ingest goes on at offset 6"
    for is_dry_run in (True, False):
        sentences = await accept_truncated(log, store, is_dry_run=is_dry_run)
        assert sentences[0] == expected
        assert sentences[1].startswith("history-updates/1: begins at offset 1")
        assert store.positions("main", "interactions") == {0: 4 if is_dry_run else 6, 1: 5}
    assert store.positions("main", "history-updates") == {1: 1}
    assert not [one for one in await accept_truncated(log, store, is_dry_run=False) if "given up" in one]
    assert store.positions("main", "interactions") == {0: 6, 1: 5}


async def test_after_a_reset_every_partition_is_read_from_its_start_under_a_new_name(
    log: MemoryLog, store: FeatureStore
) -> None:
    # Partition 1 has grown past its old position: by itself it looks whole.
    stand_at(store, "main", {0: 50, 1: 5})
    with pytest.raises(OpsError, match="--reset"):
        await accept_truncated(log, store, is_dry_run=False)
    await accept_reset(log, store, is_dry_run=True)
    assert store.current_log_id("main") == "main"
    sentences = await accept_reset(log, store, is_dry_run=False)
    assert sentences[1] == "interactions/1: ingest goes on at offset 0, 10 records before the end"
    assert store.current_log_id("main") == "main~1"
    assert store.positions("main~1", "interactions") == {0: 0, 1: 0}
    assert (await read_status(log, store)).is_whole
    stand_at(store, "main~1", {0: 11})
    await accept_reset(log, store, is_dry_run=False)
    assert store.current_log_id("main") == "main~2"


async def test_when_only_the_updates_were_made_anew_positions_stay(log: MemoryLog, store: FeatureStore) -> None:
    stand_at(store, "main", {0: 4})
    sentences = await accept_reset(log, store, is_dry_run=False)
    assert "positions stay" in sentences[0]
    assert store.positions("main~1", "interactions") == {0: 4, 1: 0}


def test_names_of_logs_that_look_alike_are_told_apart(store: FeatureStore) -> None:
    for log_id in ("main", "main~2", "main_x~9", "mainly~7", "main~x"):
        stand_at(store, log_id, {0: 1})
    assert store.current_log_id("main") == "main~2"
    assert store.current_log_id("main_") == "main_"
    assert store.current_log_id("other") == "other"


def test_what_cannot_be_meant_is_one_sentence(headrace: Headrace) -> None:
    assert_refused(headrace("log", "accept"), "--truncated", "--reset", "headrace log status")
    assert_refused(headrace("log", "accept", "--truncated", "--reset"), "give one of")


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[LearningInstallation]:
    with migrated_database("sqlite", tmp_path) as url, LearningInstallation(tmp_path, fresh_broker, url) as made:
        yield made


def learned_by(worker: Daemon) -> int | None:
    learned: int | None = worker.status().get("snapshot", {}).get("learned_interactions")
    return learned


@pytest.mark.timeout(600)
def test_after_the_broker_lost_its_log_the_loop_goes_on_with_the_weights_it_has(
    installation: LearningInstallation, fresh_broker: LocalBroker, headrace: Headrace
) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        ran = headrace("log", *arguments, **{k: v for k, v in installation.environment.items() if "HEADRACE_" in k})
        return ran.returncode, ran.stdout

    installation.send(400)
    ingest, trainer, worker = (installation.start(name) for name in ("ingest", "train", "serve"))
    installation.wait(lambda: learned_by(worker) == 400, "serving what was learned", timeout_s=120)
    for process in (ingest, trainer):
        process.stop()
    fresh_broker.stop()
    fresh_broker.start()
    installation.send(200)

    ingest = installation.start("ingest")
    installation.wait(lambda: not ingest.is_running, "the refusal")
    assert ingest.process.returncode == 2, installation.logs()
    said = ingest.said().splitlines()[-1]
    assert said.startswith("headrace: interactions/0 was reset: offset 440 is to be read next")
    assert "220 records" in said
    assert "headrace log accept --reset" in said
    returncode, status = command("status", "--json")
    assert returncode == 1
    (row,) = json.loads(status)["partitions"]
    assert (row["position"], row["start"], row["end"], row["verdict"]) == (440, 0, 220, "reset")
    assert command("accept", "--reset")[0] == 0
    assert command("status")[0] == 1, "a dry run changed something"
    assert "known as 'main~1'" in command("accept", "--reset", "--yes")[1]
    assert command("status")[0] == 0

    _, trainer = (installation.start(name) for name in ("ingest", "train"))
    installation.wait(lambda: installation.store.totals().num_interactions == 600, "storing the new events")
    installation.wait(lambda: learned_by(worker) == 600, "serving what was learned since")
    trainer_status = trainer.status()
    assert trainer_status["positions"] == {"0": 220}
    assert trainer_status["fingerprint"] == str(installation.store.totals().fingerprint)
    installation.wait(lambda: worker.status()["weights_behind_ms"] == 0, "serving being up to date")
    assert httpx.post(f"{worker.address}/v1/recommend", json={"user_id": 1, "k": 5}).json()["fallback"] is False
