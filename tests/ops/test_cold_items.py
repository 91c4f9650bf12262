"""An item that nobody has interacted with, known by its content alone, is scored and recommended: real processes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from feature_store.ids import stable_id
from stream.kafka import KafkaLog
from stream.log import acknowledged
from stream.messages import ItemMessage, encode_message
from tests.ops.test_kill import LearningInstallation, ingest_everything, installation, served_version

__all__ = ["installation"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COLD = ["a film that is not out yet", "another one"]


def say(installation: LearningInstallation, messages: list[ItemMessage]) -> None:
    async def produce() -> None:
        log = KafkaLog(installation.kafka)
        await log.create_topics()
        writer = log.writer()
        await writer.start()
        sends = [
            await writer.send(log.topics.items, encode_message(one), key=str(one.item_id).encode()) for one in messages
        ]
        await acknowledged(sends)
        await writer.stop()

    asyncio.run(produce())


def test_an_item_with_content_and_no_interaction_is_scored_and_recommended(installation: LearningInstallation) -> None:
    films = [ItemMessage(item_id=item, embedding=[float(item % 3), 1.0], categories=["film"]) for item in range(60)]
    cold = [ItemMessage(item_id=item, title=item, embedding=[2.0, 1.0], categories=["film"]) for item in COLD]
    say(installation, films + cold)
    ingest = installation.start("ingest")
    ids = [stable_id(one) for one in COLD]
    installation.wait(lambda: len(installation.store.names("item", ids)) == len(COLD), "ingesting the items")
    ingest.stop()
    installation.send(600)
    ingest_everything(installation)
    trainer, worker = installation.start("train", HEADRACE_ITEMS__COLD_ITEMS="1000"), installation.start("serve")
    installation.wait(lambda: trainer.status().get("interactions") == 600, "learning everything")
    assert trainer.status()["cold_items"] >= len(COLD)
    trainer.stop()
    installation.wait(lambda: worker.status().get("snapshot", {}).get("learned_interactions") == 600, "the swap")
    assert served_version(worker) is not None
    ranked: dict[str, Any] = httpx.post(
        f"{worker.address}/v1/rank", json={"user_id": 1, "candidates": [3, *COLD]}
    ).json()
    assert all(item["score"] is not None for item in ranked["items"]), ranked
    answer = httpx.post(f"{worker.address}/v1/recommend", json={"user_id": 1, "k": 62}).json()
    assert answer["fallback"] is False
    assert set(COLD) <= {item["item_id"] for item in answer["items"]}
    worker.stop()
