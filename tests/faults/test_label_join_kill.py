"""SIGKILL of the label join at each of its steps: every label is written, whatever is written twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_store.interactions import Interactions
from ops.local_broker import LocalBroker
from stream.clock import WallClock
from stream.events import Event, EventRules, encode_event
from stream.kafka import KafkaLog
from stream.log import acknowledged
from stream.messages import Impression, Labels, Topics, decode_message, encode_message
from tests.faults.installation import Installation
from tests.faults.observing import read_topic
from tests.feature_store.databases import migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(600)]

NUM_USERS = 8


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[Installation]:
    settings = {
        "HEADRACE_LABELS__WINDOW_MS": "10000",
        "HEADRACE_LABELS__ALLOWED_LATENESS_MS": "0",
        "HEADRACE_LABELS__BATCH_WAIT_MS": "20",
    }
    servers = fresh_broker.bootstrap_servers
    with (
        migrated_database("sqlite", tmp_path) as url,
        Installation(tmp_path, servers, url, settings=settings) as made,
    ):
        yield made


@pytest.fixture
def patient(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[Installation]:
    """One whose windows last longer than the test, and whose labels wait for a view and a like."""
    settings = {
        "HEADRACE_LABELS__WINDOW_MS": "1800000",
        "HEADRACE_LABELS__ALLOWED_LATENESS_MS": "0",
        "HEADRACE_LABELS__BATCH_WAIT_MS": "20",
        "HEADRACE_RANKING__TASKS": '["view", "like"]',
    }
    with (
        migrated_database("sqlite", tmp_path) as url,
        Installation(tmp_path, fresh_broker.bootstrap_servers, url, settings=settings) as made,
    ):
        yield made


def produce(installation: Installation, topic: str, values: list[bytes]) -> None:
    async def send() -> None:
        log = KafkaLog(installation.kafka)
        await log.create_topics()
        writer = log.writer()
        await writer.start()
        await acknowledged([await writer.send(topic, value) for value in values])
        await writer.stop()

    asyncio.run(send())


def test_killed_at_every_step_it_writes_each_label(installation: Installation) -> None:
    """Impressions whose windows are over: opened, taken from the histories and closed in one transaction."""
    shown_at_ms = WallClock().now_ms() - 20_000
    expected: set[tuple[str, int | str, str]] = set()
    store_what_was_taken(installation, shown_at_ms)

    def show(request_id: str) -> None:
        impressions = [
            Impression(
                request_id=f"{request_id}-{user}",
                user_id=user,
                items=[1, 2, 3],
                scores=[0.3, 0.2, 0.1],
                snapshot_version=None,
                shown_at_ms=shown_at_ms,
                predictions={"view": [user / 10 + item for item in (1, 2, 3)]},
            )
            for user in range(NUM_USERS)
        ]
        produce(installation, Topics().impressions, [encode_message(impression) for impression in impressions])
        for impression in impressions:
            outcomes = ((1, "taken"), (2, "not_taken"), (3, "not_taken"), (3, "late"))
            expected.update((impression.request_id, item, outcome) for item, outcome in outcomes)

    for fail_point in ("labels.applied:1", "labels.produced:1", "labels.committed:1"):
        show(fail_point)
        installation.start("ingest", fail_point=fail_point).expect_kill(fail_point)
    join_until(installation, lambda labels: bool(labels["read_up_to_ms"]) and labels["open"] == 0)
    # What comes now is late: corrections, with a crash between sending and committing them.
    late = [
        Event(event_id=f"late-{user}", user_id=user, item_id=3, action="view", event_time=shown_at_ms + user)
        for user in range(NUM_USERS)
    ]
    produce(installation, Topics().interactions, [encode_event(event) for event in late])
    installation.start("ingest", fail_point="labels.produced:1").expect_kill("labels.produced:1")
    join_until(installation, lambda labels: bool(labels["late"] == 3 * NUM_USERS))
    messages = [decode_message(Labels, record.value) for record in read_topic(installation.kafka, Topics().labels)]
    labels = [
        (message.request_id, item, "late" if message.late else message.outcome)
        for message in messages
        for item in message.items
    ]
    for message in messages:
        user = int(message.user_id)
        assert message.predictions == {"view": [user / 10 + int(item) for item in message.items]}
    assert set(labels) == expected
    sent_again = {request_id for request_id, item, outcome in labels if labels.count((request_id, item, outcome)) > 1}
    assert any(request_id.startswith("labels.produced") for request_id in sent_again)


def test_killed_at_every_step_while_labels_wait_each_holds_all_that_was_done(patient: Installation) -> None:
    """Views and likes are predicted: a label waits for the other one, across restarts, until the window is over."""
    shown_at_ms = WallClock().now_ms()
    liked, requests = [1, 3], ("labels.applied:1", "labels.produced:1", "labels.committed:1")

    def act(action: str, users: Iterable[int]) -> None:
        events = [
            Event(event_id=f"{action}-{user}", user_id=user, item_id=1, action=action, event_time=shown_at_ms + user)
            for user in users
        ]
        produce(patient, Topics().interactions, [encode_event(event) for event in events])

    for fail_point in requests:
        impressions = [
            Impression(
                request_id=f"{fail_point}-{user}",
                user_id=user,
                items=[1, 2],
                scores=[0.3, 0.2],
                snapshot_version=None,
                shown_at_ms=shown_at_ms,
            )
            for user in range(NUM_USERS)
        ]
        produce(patient, Topics().impressions, [encode_message(impression) for impression in impressions])
        if fail_point == requests[0]:
            act("view", range(NUM_USERS))
        patient.start("ingest", fail_point=fail_point).expect_kill(fail_point)
    join_until(patient, lambda labels: labels["open"] == 3 * NUM_USERS and num_waiting(patient) == 3 * NUM_USERS)
    assert read_topic(patient.kafka, Topics().labels) == []
    # Both are known of some: labelled at once. A crash after it was sent sends it again.
    act("like", liked)
    patient.start("ingest", fail_point="labels.produced:1").expect_kill("labels.produced:1")
    join_until(
        patient, lambda labels: bool(labels["read_up_to_ms"]) and num_waiting(patient) == 3 * (NUM_USERS - len(liked))
    )
    # The windows are over.
    with patient.store.transaction() as transaction:
        waiting = transaction.impressions.due(2**62, 1_000)
        for impression in waiting:
            impression.due_ms = 0
        transaction.impressions.save(waiting)
    for fail_point in requests:
        patient.start("ingest", fail_point=fail_point).expect_kill(fail_point)
    join_until(patient, lambda labels: bool(labels["read_up_to_ms"]) and labels["open"] == 0)
    found: dict[tuple[str, int | str, str], set[int]] = {}
    for message in (decode_message(Labels, record.value) for record in read_topic(patient.kafka, Topics().labels)):
        for number, item in enumerate(message.items):
            of_label = found.setdefault((message.request_id, item, message.outcome), set())
            of_label.add(message.actions[number] if message.actions else 0)
    view, like = (1 << EventRules().actions.index(action) for action in ("view", "like"))
    expected = {
        (f"{request}-{user}", item, outcome): {actions}
        for request in requests
        for user in range(NUM_USERS)
        for item, outcome, actions in (
            (1, "taken", view | (like if user in liked else 0)),
            (2, "not_taken", 0),
        )
    }
    assert found == expected


def num_waiting(installation: Installation) -> int:
    """Items whose labels wait for more."""
    with installation.store.transaction() as transaction:
        return sum(len(impression.pending) for impression in transaction.impressions.due(2**62, 1_000))


def store_what_was_taken(installation: Installation, shown_at_ms: int) -> None:
    """Item 1, by every user, in its window."""
    users = np.arange(NUM_USERS)
    taken = Interactions(
        user_id=users,
        item_id=np.ones(NUM_USERS, np.int64),
        event_time_ms=shown_at_ms + users,
        action=np.ones(NUM_USERS, np.uint32),
        value=np.full(NUM_USERS, np.nan, np.float32),
        event_key=users.astype(np.uint64),
        seq=np.zeros(NUM_USERS, np.uint32),
        arrival_ms=shown_at_ms + users,
    )
    with installation.store.transaction() as transaction:
        transaction.append(taken)


def join_until(installation: Installation, is_done: Callable[[dict[str, Any]], bool]) -> None:
    ingest = installation.start("ingest")

    def ask() -> bool:
        labels = ingest.status().get("labels")
        return labels is not None and is_done(labels)

    installation.wait(ask, "joining everything")
    ingest.stop()
