"""The log on a Kafka-protocol broker: Apache Kafka, Redpanda, or the local broker."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, OffsetOutOfRangeError, TopicAlreadyExistsError
from aiokafka.helpers import create_ssl_context
from opentelemetry import metrics

from stream.errors import LogUnavailableError, RecordTooLargeError
from stream.fetching import RawRecord, count_consumed, end_of, fetch_fairly, messaging_attributes, refuse_reset
from stream.log import PartitionId, Record, Start
from stream.log_bounds import LogBounds, Standing, no_such_partition
from stream.messages import COMPACTED_TOPICS, Topics
from stream.tracing import Headers

logger = logging.getLogger(__name__)

_sent = metrics.get_meter("headrace.stream").create_counter(
    "messaging.client.sent.messages", unit="{message}", description="Records handed to the producer, by topic"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaConfig:
    """How to reach the broker (Apache Kafka, Redpanda, or the local broker)."""

    bootstrap_servers: str = "127.0.0.1:9092"
    """Comma-separated host:port list."""
    log_id: str = "main"
    """Name of this log; stored with every position. `headrace log accept --reset` starts a new one."""
    topic_prefix: str = ""
    """Put before every topic name, so that several installations can share one cluster."""
    num_partitions: int = 4
    """Partitions of `interactions` and `history-updates` when headrace creates them: at most so many ingest workers."""
    replication_factor: int = 1
    """Replicas of topics that headrace creates; 3 in production."""
    security_protocol: str = "PLAINTEXT"
    """PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."""
    sasl_mechanism: str = "PLAIN"
    """PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; used with SASL_*."""
    sasl_username: str = ""
    """User for SASL."""
    sasl_password: str = ""
    """Secret: set it by environment or `sasl_password_file`, never in the file."""
    ssl_cafile: str = ""
    """CA certificate (PEM) to verify brokers with; empty: the system's."""
    ssl_certfile: str = ""
    """Client certificate (PEM) for mutual TLS."""
    ssl_keyfile: str = ""
    """Client key (PEM) for mutual TLS."""
    request_timeout_ms: int = 15_000
    """A broker that does not answer within this time counts as away (ms)."""
    max_message_bytes: int = 4_194_304
    """Largest record headrace sends or fetches per partition (bytes); the broker's own limit must allow it."""
    fetch_max_wait_ms: int = 50
    """How long the broker may hold a fetch that has no data (ms): a floor under freshness on a quiet stream."""

    def __post_init__(self) -> None:
        if self.security_protocol not in {"PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"}:
            raise ValueError(
                f"log.security_protocol = {self.security_protocol!r}: use PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
            )
        if self.sasl_mechanism not in {"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"}:
            raise ValueError(f"log.sasl_mechanism = {self.sasl_mechanism!r}: use PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
        if not 1 <= self.num_partitions <= 1024:
            raise ValueError(f"log.num_partitions = {self.num_partitions}: must lie in 1..1024")
        if self.replication_factor < 1:
            raise ValueError(f"log.replication_factor = {self.replication_factor}: must be at least 1")
        if not 1 <= len(self.log_id) <= 100:
            raise ValueError("log.log_id is empty or longer than 100 characters: positions belong to a named log")
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ValueError(f"log.{name} = {path!r}: there is no such file")
        if self.security_protocol.startswith("SASL") and not self.sasl_username:
            raise ValueError(f"log.security_protocol = {self.security_protocol!r} needs log.sasl_username")

    def client_options(self) -> dict[str, Any]:
        """Connection options in aiokafka's words, for consumers, producers and admin clients."""
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": self.security_protocol,
            "request_timeout_ms": self.request_timeout_ms,
        }
        if self.security_protocol.startswith("SASL"):
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password,
            }
        context = self.ssl_context()
        if context is not None:
            options["ssl_context"] = context
        return options

    def consumer_options(self) -> dict[str, Any]:
        """`client_options` and what every consumer is to do: count offsets nowhere but in SQL, and leave out what a
        producer's aborted transaction has written.
        """
        return self.client_options() | {
            "enable_auto_commit": False,
            "fetch_max_wait_ms": self.fetch_max_wait_ms,
            "isolation_level": "read_committed",
        }

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS context for the SSL protocols, else None."""
        if not self.security_protocol.endswith("SSL"):
            return None
        context: ssl.SSLContext = create_ssl_context(
            cafile=self.ssl_cafile or None, certfile=self.ssl_certfile or None, keyfile=self.ssl_keyfile or None
        )
        return context


class KafkaLog:
    """The log on a Kafka-protocol broker."""

    def __init__(self, config: KafkaConfig) -> None:
        self.config = config
        self.topics = Topics.with_prefix(config.topic_prefix)
        self.log_id = config.log_id

    def reader(self) -> KafkaReader:
        """A reader without a consumer group."""
        return KafkaReader(self.config)

    def writer(self) -> KafkaWriter:
        """A writer that waits for all in-sync replicas."""
        return KafkaWriter(self.config)

    async def create_topics(self) -> None:
        """Create the topics that do not exist yet; raises LogUnavailableError."""
        admin = AIOKafkaAdminClient(**self.config.client_options())
        try:
            await admin.start()
            existing = set(await admin.list_topics())
            wanted = [self._new_topic(field.name) for field in fields(Topics)]
            missing = [topic for topic in wanted if topic.name not in existing]
            for topic in missing:
                try:
                    await admin.create_topics([topic])
                except TopicAlreadyExistsError:
                    logger.debug("topic %s was created by another process", topic.name)
        except (KafkaError, OSError) as error:
            raise LogUnavailableError(self._away(error)) from error
        finally:
            await admin.close()

    def _new_topic(self, field: str) -> NewTopic:
        parallel = field in {"interactions", "history_updates"}
        return NewTopic(
            name=getattr(self.topics, field),
            num_partitions=self.config.num_partitions if parallel else 1,
            replication_factor=self.config.replication_factor,
            topic_configs={"cleanup.policy": "compact"} if field in COMPACTED_TOPICS else {},
        )

    def _away(self, error: BaseException) -> str:
        return f"the broker at {self.config.bootstrap_servers} does not answer: {error}"


class KafkaReader:
    """LogReader on aiokafka."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._consumer: Any = None
        self._next: dict[TopicPartition, int] = {}
        self._answered_ms = -1
        self._silent_s = 0.0
        """Time spent in polls since the broker last answered a fetch: the client alone tries again for ever."""

    async def start(self) -> None:
        """Connect; raises LogUnavailableError."""
        consumer = AIOKafkaConsumer(
            group_id=None,
            auto_offset_reset="none",
            max_partition_fetch_bytes=self._config.max_message_bytes,
            **self._config.consumer_options(),
        )
        try:
            await consumer.start()
        except asyncio.CancelledError:
            await consumer.stop()
            raise
        except (KafkaError, OSError) as error:
            await consumer.stop()
            raise LogUnavailableError(
                f"the broker at {self._config.bootstrap_servers} does not answer: {error}"
            ) from error
        self._consumer = consumer

    async def stop(self) -> None:
        """Disconnect."""
        if self._consumer is not None:
            # aiokafka awaits its own cancelled task, and lets the cancellation out if that task has not run yet.
            await asyncio.sleep(0)
            await self._consumer.stop()
            self._consumer = None

    async def partitions(self, topic: str) -> list[int]:
        """Partition numbers of a topic; raises LogUnavailableError when it does not exist."""
        found = self._consumer.partitions_for_topic(topic)
        if not found:
            await self._consumer.topics()
            found = self._consumer.partitions_for_topic(topic)
        if not found:
            raise LogUnavailableError(f"topic {topic!r} does not exist at {self._config.bootstrap_servers}")
        return sorted(found)

    async def bounds(self, topic: str) -> dict[int, LogBounds]:
        """See LogReader."""
        partitions = [TopicPartition(topic, partition) for partition in await self.partitions(topic)]
        self._consumer.assign(partitions)
        self._next = {}
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000):
                starts = await self._consumer.beginning_offsets(partitions)
                ends = await self._consumer.end_offsets(partitions)
                # The local broker may report the base offset of the last batch; the end that a fetch brings is right.
                for partition in partitions:
                    self._consumer.seek(partition, ends[partition])
                while any(self._consumer.highwater(partition) is None for partition in partitions):
                    await self._consumer.getmany(timeout_ms=self._config.fetch_max_wait_ms)
        except (KafkaError, TimeoutError) as error:
            raise LogUnavailableError(
                f"{topic} at {self._config.bootstrap_servers} cannot be read: {error!r}"
            ) from error
        return {p.partition: LogBounds(starts[p], self._consumer.highwater(p)) for p in partitions}

    async def since(self, topic: str, at_ms: int) -> dict[int, int]:
        """See LogReader."""
        bounds = await self.bounds(topic)
        try:
            found = await self._consumer.offsets_for_times({TopicPartition(topic, p): at_ms for p in bounds})
        except (KafkaError, ValueError) as error:
            raise LogUnavailableError(
                f"{topic} at {self._config.bootstrap_servers} cannot be searched by time: {error!r}"
            ) from error
        # None: everything in the partition is older.
        return {p.partition: bounds[p.partition].end if at is None else at.offset for p, at in found.items()}

    async def assign(self, starts: Mapping[PartitionId, Start]) -> None:
        """Read these partitions from these positions, replacing any earlier assignment."""
        partitions = {TopicPartition(*partition): start for partition, start in starts.items()}
        self._consumer.assign(list(partitions))
        self._next = {partition: start for partition, start in partitions.items() if isinstance(start, int)}
        for partition, start in partitions.items():
            if start == "earliest":
                await self._consumer.seek_to_beginning(partition)
            elif start == "latest":
                # The local broker may report the base offset of the last batch; re-reading its tail is harmless.
                await self._consumer.seek_to_end(partition)
            else:
                self._consumer.seek(partition, start)

    async def poll(self, *, timeout_ms: int, max_records: int) -> list[Record]:
        """See LogReader; raises LogResetError when a position no longer exists in the log."""
        started_s = time.monotonic()
        try:
            fetched = await fetch_fairly(self._consumer, timeout_ms=timeout_ms, max_records=max_records)
        except OffsetOutOfRangeError as error:
            await self._refuse_loss(error)
        except KafkaError as error:
            raise LogUnavailableError(f"reading from {self._config.bootstrap_servers} failed: {error}") from error
        if not fetched:
            self._refuse_silence(time.monotonic() - started_s)
        for partition, records in fetched.items():
            self._next[partition] = records[-1].offset + 1
            count_consumed(partition.topic, len(records))
        refuse_reset(self._consumer, self._next)
        return [_record(partition, raw) for partition, records in fetched.items() for raw in records]

    def _refuse_silence(self, polled_s: float) -> None:
        """Raise LogUnavailableError once the broker has not answered for log.request_timeout_ms of polling."""
        moments = [self._consumer.last_poll_timestamp(partition) or 0 for partition in self._consumer.assignment()]
        if not moments or max(moments) != self._answered_ms:
            self._answered_ms, self._silent_s = max(moments, default=-1), 0.0
            return
        self._silent_s += polled_s
        if self._silent_s * 1000 >= self._config.request_timeout_ms:
            raise LogUnavailableError(
                f"the broker at {self._config.bootstrap_servers} does not answer: no fetch within "
                f"{self._config.request_timeout_ms} ms"
            )

    async def _refuse_loss(self, error: OffsetOutOfRangeError) -> Never:
        """Raise LogResetError with what was lost at the offsets that an OffsetOutOfRangeError names."""
        positions: dict[TopicPartition, int] = error.args[0]
        try:
            starts = await self._consumer.beginning_offsets(list(positions))
            ends = await self._consumer.end_offsets(list(positions))
        except KafkaError as away:
            raise LogUnavailableError(f"reading from {self._config.bootstrap_servers} failed: {away}") from away
        for partition, position in positions.items():
            bounds = LogBounds(starts[partition], ends[partition])
            Standing(
                topic=partition.topic, partition=partition.partition, position=position, bounds=bounds
            ).refuse_loss()
        # Between the fetch and our look the log came to hold the position: try again.
        raise LogUnavailableError(f"reading from {self._config.bootstrap_servers} failed: {error}") from error

    async def read_up_to_ms(self) -> int | None:
        """See LogReader: the oldest of the partitions' last answers, if each has been read to the end it told."""
        moments: list[int] = []
        for partition in self._consumer.assignment():
            end, answered_ms = end_of(self._consumer, partition), self._consumer.last_poll_timestamp(partition)
            if end is None or answered_ms is None or await self._consumer.position(partition) < end:
                return None
            moments.append(answered_ms)
        return min(moments, default=None)


class KafkaWriter:
    """LogWriter on aiokafka: acks=all, one batch in flight per partition, so order survives retries.

    Not idempotent on purpose: readers of our topics drop what they have already applied, and not every broker
    supports idempotent producers.
    """

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._producer: Any = None

    async def start(self) -> None:
        """Connect; raises LogUnavailableError."""
        producer = AIOKafkaProducer(
            acks="all",
            linger_ms=0,
            max_request_size=self._config.max_message_bytes,
            **self._config.client_options(),
        )
        try:
            await producer.start()
        except asyncio.CancelledError:
            await producer.stop()
            raise
        except (KafkaError, OSError) as error:
            await producer.stop()
            raise LogUnavailableError(
                f"the broker at {self._config.bootstrap_servers} does not answer: {error}"
            ) from error
        self._producer = producer

    async def stop(self) -> None:
        """Send what is buffered and disconnect."""
        if self._producer is not None:
            await self._producer.stop()
            self._producer = None

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Awaitable[object]:
        """Queue a record; awaiting the result waits for the acknowledgement. Raises LogUnavailableError."""
        try:
            if partition is not None and partition not in await self._producer.partitions_for(topic):
                raise no_such_partition(topic, partition)
            sent: Awaitable[object] = await self._producer.send(
                topic, value, key=key, partition=partition, headers=list(headers)
            )
        except MessageSizeTooLargeError as error:
            limit = self._config.max_message_bytes
            raise RecordTooLargeError(
                f"a record for {topic!r} is too large: log.max_message_bytes is {limit}"
            ) from error
        except KafkaError as error:
            raise LogUnavailableError(f"sending to {topic!r} failed: {error}") from error
        _sent.add(1, messaging_attributes(topic, "send"))
        return sent


def _record(partition: TopicPartition, raw: RawRecord) -> Record:
    topic, number = partition
    return Record(topic, number, raw.offset, raw.timestamp, raw.key, raw.value, tuple(raw.headers))
