"""SIGKILL of a trainer between labels, with a real broker and real processes: each label has its effect once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.local_broker import LocalBroker
from stream.kafka import KafkaLog
from stream.log import acknowledged
from stream.messages import Labels, encode_message
from tests.feature_store.databases import migrated_database
from tests.ops.test_kill import BASE_MS, LearningInstallation, ingest_everything

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

NUM_LABELS = 60
ITEMS = 4


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[LearningInstallation]:
    with migrated_database("sqlite", tmp_path) as url, LearningInstallation(tmp_path, fresh_broker, url) as made:
        made.environment |= {"HEADRACE_RANKING__TASKS": '["rating"]', "HEADRACE_RANKING__BATCH_ITEMS": "16"}
        yield made


def write_labels(installation: LearningInstallation) -> None:
    """Every fifth message twice, as after a crash of the join."""
    labels = [
        Labels(
            request_id=f"r{number}",
            user_id=number % 40,
            shown_at_ms=BASE_MS + 1_000_000,
            snapshot_version=1,
            outcome="not_taken",
            late=False,
            items=[(7 * number + place) % 60 for place in range(ITEMS)],
            places=list(range(ITEMS)),
            scores=[None] * ITEMS,
            actions=[],
            event_times_ms=[],
            from_ms=2**52,
            predictions={"rating": [0.25] * ITEMS},
        )
        for number in range(NUM_LABELS)
    ]

    async def produce() -> None:
        log = KafkaLog(installation.kafka)
        writer = log.writer()
        await writer.start()
        sent = [one for number, each in enumerate(labels) for one in [each] * (2 if number % 5 == 0 else 1)]
        await acknowledged(
            [await writer.send(log.topics.labels, encode_message(one), key=str(one.user_id).encode()) for one in sent]
        )
        await writer.stop()

    asyncio.run(produce())


def test_a_trainer_killed_between_labels_learns_each_of_them_once(installation: LearningInstallation) -> None:
    installation.send(1_000)
    ingest_everything(installation)
    write_labels(installation)
    for fail_point in ("trainer.labels_learned:3", "trainer.checkpoint_written:1", "trainer.labels_learned:5"):
        installation.start("train", fail_point=fail_point).expect_kill(fail_point)
    trainer = installation.start("train")

    def ranking() -> dict[str, Any]:
        found: dict[str, Any] = trainer.status().get("ranking") or {}
        return found

    installation.wait(lambda: ranking().get("learned") == ITEMS * NUM_LABELS, "learning every label")
    installation.wait(lambda: trainer.status()["interactions"] == 1_000, "learning every interaction")
    assert ranking()["labels"] == {"pending": 0, "unreadable": 0, "forgotten": 0, "lost": 0}
    assert ranking()["repeated"] == ITEMS * NUM_LABELS // 5
    assert trainer.status()["metrics"]["ranking.served.rating.lifetime.count"] == ITEMS * NUM_LABELS
    trainer.stop()
