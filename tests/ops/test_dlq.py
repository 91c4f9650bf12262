"""`headrace dlq` as an operator uses it, at a real broker and a real database."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store import schema
from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from ops.local_broker import LocalBroker
from ops.ports import free_port
from stream.clock import WallClock
from stream.commit import Committer
from stream.events import EventDecoder, EventRules
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged
from tests.ops.command_line import Headrace, assert_refused

NOW_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Site:
    """An installation whose ingest runs when it is told to."""

    kafka: KafkaConfig
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {"HEADRACE_LOG__BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers, "HEADRACE_STORE__URL": self.url}

    def send(self, *values: bytes) -> None:
        async def send() -> None:
            log = KafkaLog(self.kafka)
            await log.create_topics()
            writer = log.writer()
            await writer.start()
            topic, headers = log.topics.interactions, (("colour", b"bl\xffue"),)
            await acknowledged([await writer.send(topic, v, key=b"5", partition=0, headers=headers) for v in values])
            await writer.stop()

        asyncio.run(send())

    def ingest(self, *more_actions: str) -> list[int]:
        """Apply what is in the log, with these actions declared too; returns the items stored of user 5."""

        async def apply(store: FeatureStore) -> None:
            log = KafkaLog(self.kafka)
            writer, reader, topic = log.writer(), log.reader(), log.topics.interactions
            await writer.start()
            await reader.start()
            rules = EventRules(actions=(*EventRules().actions, *more_actions))
            committer = Committer(
                store=store,
                writer=writer,
                topics=log.topics,
                log_id=log.log_id,
                decoder=EventDecoder(rules),
                clock=WallClock(),
            )
            stored = await committer.stored_positions()
            await reader.assign({(topic, 0): stored.get(0, 0)})
            while records := await reader.poll(timeout_ms=500, max_records=100):
                await committer.commit(0, records)
            committer.close()
            await reader.stop()
            await writer.stop()

        store = FeatureStore(FeatureStoreConfig(url=self.url))
        asyncio.run(apply(store))
        items: list[int] = store.read(np.array([5]), max_len=100).item_id.tolist()
        store.close()
        return items


@pytest.fixture
def site(fresh_broker: LocalBroker, tmp_path: Path) -> Site:
    url = f"sqlite:///{tmp_path}/store.db"
    schema.migrate(url)
    return Site(KafkaConfig(bootstrap_servers=fresh_broker.bootstrap_servers, num_partitions=1), url)


def event(number: int, **changes: Any) -> bytes:
    made = {"event_id": f"e{number}", "user_id": 5, "item_id": number, "action": "stare"}
    return json.dumps(made | {"event_time": NOW_MS + number} | changes).encode()


def test_letters_are_listed_shown_sent_back_and_stored_once(headrace: Headrace, site: Site) -> None:
    site.send(event(1), b"\x1b[31m{not json\xff", event(2))
    assert site.ingest() == []

    listed = headrace("dlq", "ls", **site.environment)
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0:0", "0:1", "0:2"]
    assert "unknown_action (action)" in lines[0]
    assert "interactions/0:0" in lines[0]
    assert r"\x1b[31m{not json\xff" in lines[1]  # readable, and it does not steer the terminal

    found = headrace("dlq", "ls", "--reason", "malformed_json", "--json", **site.environment)
    (letter,) = map(json.loads, found.stdout.splitlines())
    assert (letter["place"], letter["source_offset"], letter["attempts"]) == ("0:1", 1, 1)
    assert len(headrace("dlq", "ls", "--limit", "2", **site.environment).stdout.splitlines()) == 2

    shown = headrace("dlq", "show", "0:0", **site.environment).stdout
    assert "action 'stare' is not one of" in shown
    assert r"colour: bl\xffue" in shown
    assert event(1).decode() in shown

    redrive = ("dlq", "redrive", "--reason", "unknown_action")
    dry = headrace(*redrive, "--dry-run", **site.environment)
    assert dry.stdout == "2 letters would be sent back (unknown_action 2); 0 were sent back before\n"
    assert site.ingest("stare") == []
    assert headrace(*redrive, **site.environment).stdout.startswith("2 letters sent back (unknown_action 2);")
    assert site.ingest("stare") == [1, 2]
    again = headrace(*redrive, **site.environment)
    assert again.stdout == "0 letters sent back; 2 were sent back before\n"
    assert site.ingest("stare") == [1, 2]


def test_raw_prints_the_original_bytes(headrace: Headrace, site: Site) -> None:
    site.send(b"\x00\x1b{ no end of line")
    site.ingest()
    assert headrace("dlq", "show", "0:0", "--raw", **site.environment).stdout == "\x00\x1b{ no end of line"


def test_what_cannot_be_meant_is_one_sentence(headrace: Headrace, site: Site) -> None:
    site.send(event(1))
    assert_refused(headrace("dlq", "show", "0:7", **site.environment), "no record at 0:7", "headrace dlq ls")
    for place in ("7", "0:", "a:b", "0:-1", "0:²", "0:" + "9" * 30):
        assert_refused(headrace("dlq", "show", place, **site.environment), "no place of a dead letter")
    assert_refused(headrace("dlq", "ls", "--reason", "ugly", **site.environment), "--reason ugly", "unknown_action")
    assert_refused(headrace("dlq", "redrive", "--limit", "0", **site.environment), "--limit 0")


def test_without_broker_or_schema_it_is_one_sentence(headrace: Headrace, site: Site, tmp_path: Path) -> None:
    away = site.environment | {"HEADRACE_LOG__BOOTSTRAP_SERVERS": f"127.0.0.1:{free_port()}"}
    assert_refused(headrace("dlq", "ls", **away), "does not answer")
    assert_refused(headrace("dlq", "redrive", **away), "does not answer")
    empty = site.environment | {"HEADRACE_STORE__URL": f"sqlite:///{tmp_path}/empty.db"}
    assert_refused(headrace("dlq", "redrive", **empty), "headrace migrate")
