"""Forgetting a user in a running installation: no table and no file holds a byte of it, and a later history is new.

What stays is what is not about the user: an item's id in the catalogue of the weights. What Kafka holds stays until its
retention; see docs/operations.md.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import create_engine, select

from feature_store.config import parse_url
from feature_store.ids import event_key, stable_id
from feature_store.tables import metadata
from ops.local_broker import LocalBroker
from stream.kafka import KafkaLog
from stream.log import acknowledged
from tests.feature_store.databases import migrated_database
from tests.ops.command_line import Headrace
from tests.ops.test_kill import BASE_MS, LearningInstallation

NUMBER = 0x6A3B91C24D57E8F2
TEXT = "anna.b+forget-me-7f3a@example.org"
NUM_BEFORE = 6
"""Events of each of the two before they are forgotten."""

UPSTREAM = {
    "HEADRACE_RANKING__TASKS": '["rating"]',
    "HEADRACE_UPSTREAM__WIDTH": "8",
    "HEADRACE_UPSTREAM__NUM_LAYERS": "1",
    "HEADRACE_UPSTREAM__MAX_LEN": "32",
    "HEADRACE_UPSTREAM_DAEMON__DEBOUNCE_MS": "50",
    "HEADRACE_UPSTREAM_DAEMON__FIRST_VERSION_INTERACTIONS": "20",
    "HEADRACE_UPSTREAM_DAEMON__LEARN_SHARE": "1",
    "HEADRACE_UPSTREAM_DAEMON__CHECKPOINT_INTERVAL_S": "0.3",
}


def event(name: str, user_id: int | str, at: int, **changes: Any) -> bytes:
    made = {"event_id": name, "user_id": user_id, "item_id": at % 30, "action": "view", "event_time": BASE_MS + at}
    return json.dumps(made | changes).encode()


def names_of(user_id: int | str, first: int, count: int) -> list[str]:
    return [f"evt-{user_id}-{number}" for number in range(first, first + count)]


def send(installation: LearningInstallation, events: list[bytes]) -> None:
    async def produce() -> None:
        log = KafkaLog(installation.kafka)
        await log.create_topics()
        writer = log.writer()
        await writer.start()
        await acknowledged([await writer.send(log.topics.interactions, one, partition=0) for one in events])
        await writer.stop()

    asyncio.run(produce())


def needles_of(user_id: int | str, event_names: list[str]) -> dict[str, bytes]:
    """Everything that would give the user away, as text and as bytes of either order."""
    number = stable_id(user_id) if isinstance(user_id, str) else user_id
    numbers = {f"id of {user_id}": number} | {f"key of {name}": event_key(name) for name in event_names}
    needles = {f"name {text}": text.encode() for text in (str(user_id), *event_names)}
    for what, one in numbers.items():
        needles |= {
            f"{what}, text": str(one).encode(),
            f"{what}, little": one.to_bytes(8, "little"),
            f"{what}, big": one.to_bytes(8, "big"),
        }
    return needles


def found_in_tables(installation: LearningInstallation, needles: dict[str, bytes]) -> set[str]:
    """`table.column: needle` of everything found in any column of any table."""
    engine = create_engine(parse_url(installation.environment["HEADRACE_STORE__URL"]))
    found = set()
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            for row in connection.execute(select(table)).mappings():
                for column, value in row.items():
                    raw = bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()
                    found |= {f"{table.name}.{column}: {name}" for name, needle in needles.items() if needle in raw}
    engine.dispose()
    return found


def found_in_files(root: Path, needles: dict[str, bytes]) -> set[str]:
    """`file: needle` of everything found in any file; files that go away meanwhile held nothing that stays."""
    found = set()
    for folder, _, files in os.walk(root):
        for path in (Path(folder) / name for name in files):
            try:
                raw = path.read_bytes()
            except FileNotFoundError:
                continue
            found |= {f"{path.relative_to(root)}: {name}" for name, needle in needles.items() if needle in raw}
    return found


@pytest.fixture(params=["sqlite", "postgresql"])
def installation(
    request: pytest.FixtureRequest, tmp_path: Path, fresh_broker: LocalBroker
) -> Iterator[LearningInstallation]:
    with migrated_database(request.param, tmp_path) as url, LearningInstallation(tmp_path, fresh_broker, url) as made:
        yield made


@pytest.mark.timeout(600)
def test_no_byte_of_a_forgotten_user_is_left_and_a_later_history_is_new(
    installation: LearningInstallation, headrace: Headrace
) -> None:
    environment = {name: value for name, value in installation.environment.items() if name.startswith("HEADRACE_")}

    def recommend(user_id: int | str) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.post(f"{worker.address}/v1/recommend", json={"user_id": user_id, "k": 3}).json()
        return answer

    def history(user_id: int | str) -> list[int]:
        number = stable_id(user_id) if isinstance(user_id, str) else user_id
        found: list[int] = installation.store.read(np.array([number]), max_len=100).seq.tolist()
        return found

    old = {user: names_of(user, 0, NUM_BEFORE) for user in (NUMBER, TEXT)}
    needles = {k: v for user in old for k, v in needles_of(user, old[user]).items()}
    others = [event(f"other-{n}", n % 9, n) for n in range(1, 200)]
    # Half of the two users' events are in the first step's fifty, half of them wait in the trainer; one was refused.
    early = [event(old[user][n], user, 1_000 + n) for user in old for n in range(3)]
    late = [event(old[user][n], user, 2_000 + n) for user in old for n in range(3, NUM_BEFORE)]
    send(installation, [*early, *others[:44], *late, event("evt-refused", TEXT, 0, action="teleport")])
    ingest, trainer, worker = (installation.start(daemon) for daemon in ("ingest", "train", "serve"))
    installation.wait(lambda: trainer.status().get("pending") == 6, "one step", timeout_s=120)
    installation.wait(lambda: worker.status().get("snapshot", {}).get("version") is not None, "serving")
    installation.environment |= UPSTREAM
    upstream = installation.start("upstream")
    users = np.array([NUMBER, stable_id(TEXT)])

    def vectors_below() -> list[int]:
        found = installation.store.user_states.newest("default", users, width=8)
        return [seq for seq, is_there in zip(found.next_seq, found.is_there, strict=True) if is_there]

    installation.wait(lambda: vectors_below() == [NUM_BEFORE] * 2, "vectors of both", timeout_s=60)
    assert headrace("dlq", "redrive", **environment).returncode == 0
    installation.wait(lambda: ingest.status()["refused"] == {"unknown_action": 2}, "refusing it again")
    assert not any(recommend(user)["fallback"] for user in old)
    assert found_in_tables(installation, needles), "the search finds nothing even when it should"

    sent = headrace("user", "forget", TEXT, **environment)
    assert (sent.returncode, "forget the user with the text" in sent.stdout) == (0, True), sent
    deleted = httpx.delete(f"{worker.address}/v1/users/{NUMBER}")
    assert (deleted.status_code, deleted.json()["user_id"]) == (202, NUMBER)
    installation.wait(lambda: not any(history(user) for user in old), "forgetting")
    installation.wait(lambda: not found_in_files(installation.root, needles), "erasing")
    assert not found_in_tables(installation, needles)
    installation.wait(lambda: all(recommend(user)["fallback_reason"] == "no_history" for user in old), "serving knows")

    # What waited in the trainer is counted and not learned; the user who comes back begins at 0, everywhere.
    new = names_of(TEXT, NUM_BEFORE, 4)
    send(installation, [*others[44:94], *[event(new[n], TEXT, 5_000 + n) for n in range(4)], *others[94:144]])
    installation.wait(lambda: trainer.status()["interactions"] == 150, "two more steps")
    counts = trainer.status()
    assert (counts["forgotten"], counts["out_of_reach"]) == (6, 0)
    taken = [*old[NUMBER], *old[TEXT], *new, *[f"other-{n}" for n in range(1, 145)]]
    installation.wait(lambda: trainer.status()["pending"] == len(taken) - 150, "reading everything")
    assert history(TEXT) == [0, 1, 2, 3]
    assert history(NUMBER) == []
    installation.wait(lambda: not recommend(TEXT)["fallback"], "serving the new history")
    installation.wait(lambda: vectors_below() == [4], "a vector of the new history alone")
    assert upstream.status()["waiting"] == 0
    assert recommend(TEXT)["history_event_time"] == "2023-11-14T22:13:25.003Z"
    assert recommend(NUMBER)["fallback_reason"] == "no_history"

    # What was asked for since is a new impression of the same user; what was forgotten stays so.
    forgotten = {f"{kind} {name}" for user in old for name in old[user] for kind in ("name", "key of")}
    gone = {what: needle for what, needle in needles.items() if what.split(",")[0] in forgotten}
    assert gone
    assert not found_in_files(installation.root, gone)
    assert not found_in_tables(installation, gone)
