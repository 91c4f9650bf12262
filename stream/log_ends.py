"""Asks the broker where the partitions end: what lag is measured by, and a sign of life beside the fetches.

Fetches tell the end too, but nothing is fetched of a partition whose records wait to be applied, so that lag would
stand still just when it grows; and a consumer that is cut off tries again for ever without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from stream.fetching import end_of
from stream.kafka import KafkaConfig

ASK_INTERVAL_S: Final = 1.0


class LogEnds:
    """The ends of the partitions a consumer is assigned, as of about a second ago."""

    def __init__(self, config: KafkaConfig) -> None:
        self.problem: str | None = None
        """Why the broker counts as away; None while it answers."""
        self._config = config
        self._ends: dict[TopicPartition, int] = {}

    async def watch(self, consumer: Any) -> None:
        """Ask until cancelled."""
        while True:
            await asyncio.sleep(ASK_INTERVAL_S)
            try:
                async with asyncio.timeout(self._config.request_timeout_ms / 1000):
                    await self._ask(consumer, consumer.assignment())
            except (KafkaError, TimeoutError, OSError) as error:
                why = str(error) or f"nothing within {self._config.request_timeout_ms} ms"
                self.problem = f"the broker at {self._config.bootstrap_servers} does not answer: {why}"
            else:
                self.problem = None

    async def _ask(self, consumer: Any, partitions: Collection[TopicPartition]) -> None:
        if partitions:
            self._ends = await consumer.end_offsets(list(partitions))
        else:
            await consumer.topics()

    def end(self, consumer: Any, partition: TopicPartition) -> int | None:
        """Offset after the last record, as far as known.

        The larger of both sources, because both may be old, and what the local broker reports as "latest" is too low
        by the length of its last batch.
        """
        known = [end for end in (self._ends.get(partition), end_of(consumer, partition)) if end is not None]
        return max(known, default=None)
