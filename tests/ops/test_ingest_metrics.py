"""What ingest's /metrics says of the events it took and the records it refused, from all topics."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ops.local_broker import LocalBroker
from stream.kafka import KafkaLog
from stream.log import acknowledged
from tests.faults.installation import Installation
from tests.feature_store.databases import migrated_database

BASE_MS = 1_700_000_000_000


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[Installation]:
    servers = fresh_broker.bootstrap_servers
    with migrated_database("sqlite", tmp_path) as url, Installation(tmp_path, servers, url) as made:
        yield made


def event(number: int, **changes: object) -> bytes:
    fields = {"event_id": f"e{number}", "user_id": 1, "item_id": number, "action": "view", "event_time": BASE_MS}
    return json.dumps(fields | changes).encode()


def counted(text: str, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """Labels → value of every sample of a metric, without empty labels and those that say which process it is."""
    found: dict[frozenset[tuple[str, str]], float] = {}
    for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE):
        pairs = re.findall(r'(\w+)="([^"]+)"', labels)
        found[frozenset(pair for pair in pairs if not pair[0].startswith("otel_"))] = float(value)
    return found


def test_dead_letters_are_counted_by_reason_and_source_whoever_refused_them(installation: Installation) -> None:
    log = KafkaLog(installation.kafka)

    async def produce() -> None:
        await log.create_topics()
        writer = log.writer()
        await writer.start()
        topics = log.topics
        sends = [
            *[await writer.send(topics.interactions, event(n)) for n in range(5)],
            await writer.send(topics.interactions, event(4)),
            await writer.send(topics.interactions, event(5, schema_version=2, mood="fine")),
            *[await writer.send(topics.interactions, b"{not json") for _ in range(3)],
            await writer.send(topics.interactions, event(6, action="teleport")),
            *[await writer.send(topics.items, b"{}", key=b"bad") for _ in range(2)],
            await writer.send(topics.commands, b'{"command": "dance"}'),
        ]
        await acknowledged(sends)
        await writer.stop()

    asyncio.run(produce())
    process = installation.start("ingest")
    metrics = f"{process.address}/metrics"

    def letters() -> dict[frozenset[tuple[str, str]], float]:
        try:
            return counted(httpx.get(metrics, timeout=5).text, "headrace_dead_letters_total")
        except httpx.TransportError:
            return {}

    expected = {
        frozenset({("reason", "malformed_json"), ("source_topic", "interactions")}): 3.0,
        frozenset({("reason", "unknown_action"), ("source_topic", "interactions")}): 1.0,
        frozenset({("reason", "malformed_message"), ("source_topic", "items")}): 2.0,
        frozenset({("reason", "malformed_message"), ("source_topic", "commands")}): 1.0,
    }
    installation.wait(lambda: sum(letters().values()) >= 7, "refusing seven records")
    assert letters() == expected
    text = httpx.get(metrics, timeout=5).text
    assert counted(text, "headrace_ingest_events_total") == {
        frozenset({("outcome", "accepted")}): 6.0,
        frozenset({("outcome", "duplicate")}): 1.0,
        frozenset({("outcome", "expired")}): 0.0,
        frozenset({("outcome", "refused"), ("reason", "malformed_json")}): 3.0,
        frozenset({("outcome", "refused"), ("reason", "unknown_action")}): 1.0,
    }
    assert set(counted(text, "headrace_ingest_events_newer_schema_total").values()) == {1.0}
    process.stop()
