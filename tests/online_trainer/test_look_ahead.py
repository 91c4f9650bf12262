"""Looking ahead for forgotten users where there is nothing to look at."""

from __future__ import annotations

import asyncio

from online_trainer.look_ahead import forgotten_ahead
from ops.local_broker import LocalBroker
from stream.kafka import KafkaConfig, KafkaLog


async def test_at_a_real_broker_nothing_lies_ahead_in_an_empty_topic(fresh_broker: LocalBroker) -> None:
    log = KafkaLog(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=2))
    await log.create_topics()
    async with asyncio.timeout(20):
        ahead = await forgotten_ahead(
            log, {(log.topics.history_updates, partition): "earliest" for partition in (0, 1)}
        )
    assert ahead == []
