"""A producer under continuous load that writes down what it sends: the truth the checker compares with.

The content of the load is a function of its seed; only the moments are not.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from stream.events import Event, encode_event
from stream.kafka import KafkaConfig, KafkaLog

OBSERVER: Final = "observer"
"""Kafka client id of the test's own connections, which the proxy lets through when it cuts everybody else's."""

SURFACE_KEY: Final = "page"
SURFACES: Final = ("home", "search")
_BASE_MS: Final = 1_700_000_000_000
_TICK_S: Final = 0.02
_NUM_USERS: Final = 40
_BACKLOG_MAX: Final = 3_000


@dataclass(slots=True)
class Truth:
    """What was sent, by the bytes of the record."""

    valid: dict[bytes, Event] = field(default_factory=dict)
    """Records that are events, whether or not they were sent several times."""
    refused: set[bytes] = field(default_factory=set)
    """Records that ingest has to refuse."""
    acknowledged: set[bytes] = field(default_factory=set)
    """Records the broker has taken for good: each has to be accounted for."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One record on its way to the broker."""

    partition: int
    key: bytes
    value: bytes


class EventSource:
    """Draws records: fresh events, late ones, repeated ones and malformed ones."""

    def __init__(self, seed: int, *, num_partitions: int, padding_bytes: int = 0) -> None:
        self.truth = Truth()
        self._padding = "x" * padding_bytes
        self._random = random.Random(seed)
        self._num_partitions = num_partitions
        self._recent: list[Sent] = []
        self._number = 0

    def draw(self) -> Sent:
        """The next record: of 100, about 10 repeat an earlier one, 3 are malformed and 10 are late by up to an hour."""
        kind = self._random.random()
        if kind < 0.10 and self._recent:
            return self._random.choice(self._recent)
        self._number += 1
        user = self._random.randrange(_NUM_USERS)
        partition, key = user % self._num_partitions, f"{user}".encode()
        if kind < 0.13:
            sent = Sent(partition, key, self._malformed())
            self.truth.refused.add(sent.value)
            return sent
        event = self._event(user, late_ms=self._random.randrange(3_600_000) if kind < 0.23 else 0)
        sent = Sent(partition, key, encode_event(event))
        self.truth.valid[sent.value] = event
        self._recent = [*self._recent[-500:], sent]
        return sent

    def _event(self, user: int, *, late_ms: int) -> Event:
        return Event(
            event_id=f"e{self._number}",
            # Every fourth user has a text id, whose name is stored beside the histories.
            user_id=f"user-{user}" if user % 4 == 3 else user,
            item_id=self._random.randrange(60),
            action=self._random.choice(("rating", "view", "click")),
            event_time=_BASE_MS + 100 * self._number + self._random.randrange(5_000) - late_ms,
            value=float(self._random.randrange(10)),
            context=self._context(),
        )

    def _context(self) -> dict[str, str | int | float | bool | None] | None:
        """Most events tell where they happened, some of them another place than is declared."""
        surface = self._random.choice((*SURFACES, "elsewhere", None))
        told: dict[str, str | int | float | bool | None] = {} if surface is None else {SURFACE_KEY: surface}
        return (told | ({"padding": self._padding} if self._padding else {})) or None

    def _malformed(self) -> bytes:
        number = self._number
        forms = (
            f'{{"event_id": "e{number}"'.encode(),
            f'{{"event_id": "e{number}", "user_id": 1, "item_id": 2, "action": "view"}}'.encode(),
            f'{{"event_id": "e{number}", "user_id": -1, "item_id": 2, "action": "view", "event_time": 1}}'.encode(),
            f'{{"event_id": "e{number}", "user_id": 1, "item_id": 2, "action": "teleport", "event_time": 1}}'.encode(),
            b"\xff\x00 %d" % number,
            b"",
        )
        return self._random.choice(forms)


class Load:
    """Sends records at a steady rate from a thread of its own until it is stopped, whatever happens to the broker.

    With `num_applied` it waits while thousands of its records are still to be applied.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        seed: int,
        num_partitions: int = 1,
        rate_per_s: int = 300,
        padding_bytes: int = 0,
        num_applied: Callable[[], int] | None = None,
    ) -> None:
        self.source = EventSource(seed, num_partitions=num_partitions, padding_bytes=padding_bytes)
        self.num_sent = 0
        self._kafka = KafkaConfig(
            bootstrap_servers=bootstrap_servers, num_partitions=num_partitions, request_timeout_ms=2_000
        )
        self._rate_per_s = rate_per_s
        self._num_applied = num_applied
        self._stopping, self._paused, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    @property
    def truth(self) -> Truth:
        """What has been sent so far."""
        return self.source.truth

    def pause(self) -> None:
        """Send nothing more until `resume`; on return everything sent before has been acknowledged."""
        self._idle.clear()
        self._paused.set()
        assert self._idle.wait(30) or self._failed, "the load did not come to rest"
        self._reraise()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused.clear()

    def stop(self) -> None:
        """Have everything acknowledged, and end."""
        self._stopping.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load cannot get rid of its records"
        self._reraise()

    def __enter__(self) -> Self:
        asyncio.run(KafkaLog(self._kafka).create_topics())  # records must not be the first to ask for a topic
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopping.set()
        if kind is None:
            self.stop()

    def _reraise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            asyncio.run(self._send_until_stopped())
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            self._failed = error
            self._idle.set()

    async def _send_until_stopped(self) -> None:
        producer = AIOKafkaProducer(
            acks="all", linger_ms=0, client_id=OBSERVER, retry_backoff_ms=50, **self._kafka.client_options()
        )
        await producer.start()
        started_s, num_due_before = time.monotonic(), 0
        try:
            while not self._stopping.is_set():
                await asyncio.sleep(_TICK_S)
                num_due = int((time.monotonic() - started_s) * self._rate_per_s)
                # After an outage or a pause it goes on at its rate; it does not make up for what it did not send.
                num_now = min(num_due - num_due_before, int(5 * _TICK_S * self._rate_per_s) + 1)
                num_due_before = num_due
                if self._paused.is_set():
                    self._idle.set()
                elif not self._is_far_ahead():
                    await self._deliver(producer, [self.source.draw() for _ in range(num_now)])
        finally:
            await producer.stop()

    def _is_far_ahead(self) -> bool:
        """Whether enough waits to be applied: on a busy machine the backlog of a long fault would take minutes."""
        return self._num_applied is not None and self.num_sent - self._num_applied() > _BACKLOG_MAX

    async def _deliver(self, producer: Any, records: list[Sent]) -> None:
        """Send records until the broker has them: what fails is sent again, and may then be in the log twice."""
        self.num_sent += len(records)
        while records:
            sends = [self._send(producer, record) for record in records]
            outcomes = await asyncio.gather(*sends)
            self.truth.acknowledged.update(r.value for r, good in zip(records, outcomes, strict=True) if good)
            records = [record for record, good in zip(records, outcomes, strict=True) if not good]
            if records:
                await asyncio.sleep(0.1)

    async def _send(self, producer: Any, record: Sent) -> bool:
        try:
            await producer.send_and_wait(self._topic, record.value or None, key=record.key, partition=record.partition)
        except KafkaError:
            return False
        return True

    @property
    def _topic(self) -> str:
        return KafkaLog(self._kafka).topics.interactions
