"""SIGKILL of each daemon at each fail point, with a real broker, a real database and real processes.

The checker is arithmetic: the multiset of accepted events is the union of the histories, each event was learned from
once, and the trainer that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from feature_store.config import FeatureStoreConfig
from feature_store.ids import event_key
from feature_store.interactions import Interactions
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.snapshot import list_versions, read_manifest
from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint
from ops.local_broker import LocalBroker
from stream.clock import WallClock
from stream.events import Event, encode_event
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged
from stream.messages import HistoryUpdate, Impression, Labels, Topics, decode_message, encode_message
from tests.feature_store.databases import migrated_database

pytestmark = [pytest.mark.kill, pytest.mark.timeout(240)]

BASE_MS = 1_700_000_000_000
KILLED = -signal.SIGKILL
MODEL = {"EMBEDDING_DIM": "16", "NUM_HEADS": "1", "ATTENTION_DIM": "8", "HIDDEN_DIM": "8", "MAX_LEN": "16"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Installation:
    """One headrace on this machine: a broker, a database, and daemons that are started, killed and started again."""

    def __init__(self, root: Path, broker: LocalBroker, url: str) -> None:
        self.root = root
        self.store = FeatureStore(FeatureStoreConfig(url=url))
        self.kafka = KafkaConfig(bootstrap_servers=broker.bootstrap_servers, num_partitions=1)
        self.ports = {name: free_port() for name in ("ingest", "train", "serve")}
        self.sent: dict[str, Event] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "HEADRACE_HEADRACE__DATA_DIR": str(root),
            "HEADRACE_HEADRACE__INGEST_PORT": str(self.ports["ingest"]),
            "HEADRACE_HEADRACE__TRAINER_PORT": str(self.ports["train"]),
            "HEADRACE_LOG__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "HEADRACE_LOG__NUM_PARTITIONS": "1",
            "HEADRACE_STORE__URL": url,
            "HEADRACE_INGEST__SESSION_TIMEOUT_MS": "1000",
            "HEADRACE_INGEST__MAX_BATCH_RECORDS": "100",
            "HEADRACE_HOT__MAX_LEN": "32",
            "HEADRACE_LABELS__WINDOW_MS": "10000",
            "HEADRACE_LABELS__ALLOWED_LATENESS_MS": "0",
            "HEADRACE_LABELS__BATCH_WAIT_MS": "20",
            # Batches close by count alone, so that what is learned does not depend on when.
            "HEADRACE_TRAINER__BATCH_INTERACTIONS": "50",
            "HEADRACE_TRAINER__BATCH_WAIT_MS": "3600000",
            "HEADRACE_TRAINER__CHECKPOINT_INTERVAL_S": "0.3",
            "HEADRACE_TRAINER__PUBLISH_INTERVAL_MS": "100",
            **{f"HEADRACE_MODEL__{name}": value for name, value in MODEL.items()},
        }

    def start(self, daemon: str, *, fail_point: str = "", data_dir: Path | None = None) -> subprocess.Popen[bytes]:
        arguments = ["--port", str(self.ports["serve"])] if daemon == "serve" else []
        environment = self.environment | {"HEADRACE_FAIL_POINT": fail_point}
        if data_dir is not None:
            environment["HEADRACE_HEADRACE__DATA_DIR"] = str(data_dir)
        with (self.root / f"{daemon}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ops", daemon, *arguments], env=environment, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def send(self, num_events: int) -> None:
        """Send fresh events of 40 users on 60 items, and every tenth of them twice."""
        rng = np.random.default_rng(len(self.sent))
        events = []
        for _ in range(num_events):
            number = len(self.sent)
            event = Event(
                event_id=f"e{number}",
                user_id=int(rng.integers(40)),
                item_id=int(rng.integers(60)),
                action="rating",
                event_time=BASE_MS + 1_000 * number + int(rng.integers(-5_000, 5_000)),
            )
            self.sent[event.event_id] = event
            events += [event, event] if number % 10 == 0 else [event]

        self.produce(Topics().interactions, [encode_event(event) for event in events])

    def produce(self, topic: str, values: list[bytes]) -> None:
        async def produce() -> None:
            log = KafkaLog(self.kafka)
            await log.create_topics()
            writer = log.writer()
            await writer.start()
            await acknowledged([await writer.send(topic, value) for value in values])
            await writer.stop()

        asyncio.run(produce())

    def updates(self) -> list[HistoryUpdate]:
        """Everything ingest has sent, crashes' repetitions included."""
        return [HistoryUpdate.decode(value) for value in self.read(Topics().history_updates)]

    def labels(self) -> list[Labels]:
        """The same of the label join."""
        return [decode_message(Labels, value) for value in self.read(Topics().labels)]

    def read(self, topic: str) -> list[bytes]:
        async def read() -> list[bytes]:
            reader = KafkaLog(self.kafka).reader()
            await reader.start()
            await reader.assign({(topic, 0): "earliest"})
            values: list[bytes] = []
            while polled := await reader.poll(timeout_ms=1_000, max_records=1_000):
                values += [record.value or b"" for record in polled]
            await reader.stop()
            return values

        return asyncio.run(read())

    def status(self, daemon: str) -> dict[str, Any]:
        try:
            answered: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.ports[daemon]}/status", timeout=5).json()
        except httpx.TransportError:
            return {}
        return answered

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen; logs: {self.logs()}"
            time.sleep(0.05)

    def expect_kill(self, process: subprocess.Popen[bytes], fail_point: str) -> None:
        self.wait(lambda: process.poll() is not None, f"the kill at {fail_point}")
        assert process.returncode == KILLED, f"{fail_point}: status {process.returncode}; logs: {self.logs()}"

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, self.logs()

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3_000:]}" for path in sorted(self.root.glob("*.log")))

    def checkpoint(self, data_dir: Path) -> Checkpoint:
        config = ModelConfig(**{name.lower(): int(value) for name, value in MODEL.items()})
        found = read_newest_checkpoint(data_dir / "checkpoints" / "default", config_hash=config.config_hash())
        assert found is not None
        return found

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.store.close()


@pytest.fixture
def installation(request: pytest.FixtureRequest, tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[Installation]:
    with migrated_database(getattr(request, "param", "sqlite"), tmp_path) as url:
        made = Installation(tmp_path, fresh_broker, url)
        yield made
        made.close()


def assert_histories_equal_the_truth(installation: Installation) -> None:
    events = list(installation.sent.values())
    totals = installation.store.totals()
    assert totals.num_interactions == len(events)
    assert totals.fingerprint == sum(event_key(event.event_id) for event in events) % 2**64
    users = np.unique([int(event.user_id) for event in events])
    histories = installation.store.read(users, max_len=len(events))
    for row, user in enumerate(users.tolist()):
        mine = sorted((e.event_time, event_key(e.event_id), e.item_id) for e in events if e.user_id == user)
        part = slice(histories.offsets[row], histories.offsets[row + 1])
        assert histories.item_id[part].tolist() == [item for _, _, item in mine]
        assert sorted(histories.seq[part].tolist()) == list(range(len(mine)))


def ingest_everything(installation: Installation) -> None:
    process = installation.start("ingest")
    installation.wait(
        lambda: installation.store.totals().num_interactions == len(installation.sent), "ingesting everything"
    )
    installation.stop(process)


@pytest.mark.parametrize("installation", ["sqlite", "postgresql"], indirect=True)
def test_ingest_killed_at_every_step_loses_and_doubles_nothing(installation: Installation) -> None:
    for fail_point in ("ingest.appended:2", "ingest.produced:1", "ingest.produced:3", "ingest.committed:2"):
        installation.send(300)
        installation.expect_kill(installation.start("ingest", fail_point=fail_point), fail_point)
    ingest_everything(installation)
    assert_histories_equal_the_truth(installation)
    # What a consumer applies that drops by source offset: each accepted event once, whatever was sent again.
    applied: list[int] = []
    last_offset = -1
    updates = installation.updates()
    for update in updates:
        fresh = update.above(last_offset)
        applied += fresh.interactions.event_key.tolist()
        last_offset = max(last_offset, update.last_offset)
    assert sorted(applied) == sorted(event_key(event_id) for event_id in installation.sent)
    assert sum(len(update.offsets) for update in updates) > len(applied), "no crash made ingest send anything again"


def test_the_label_join_killed_at_every_step_writes_each_label(installation: Installation) -> None:
    """Impressions whose windows are over: opened, taken from the histories and closed in one transaction."""
    shown_at_ms, num_users = WallClock().now_ms() - 20_000, 8
    expected: set[tuple[str, int | str, str]] = set()
    users = np.arange(num_users)
    taken = Interactions(
        user_id=users,
        item_id=np.ones(num_users, np.int64),
        event_time_ms=shown_at_ms + users,
        action=np.ones(num_users, np.uint32),
        value=np.full(num_users, np.nan, np.float32),
        event_key=users.astype(np.uint64),
        seq=np.zeros(num_users, np.uint32),
        arrival_ms=shown_at_ms + users,
    )
    with installation.store.transaction() as transaction:
        transaction.append(taken)

    def show(request_id: str) -> None:
        impressions = [
            Impression(
                request_id=f"{request_id}-{user}",
                user_id=user,
                items=[1, 2, 3],
                scores=[0.3, 0.2, 0.1],
                snapshot_version=None,
                shown_at_ms=shown_at_ms,
            )
            for user in range(num_users)
        ]
        installation.produce(Topics().impressions, [encode_message(impression) for impression in impressions])
        for impression in impressions:
            outcomes = ((1, "taken"), (2, "not_taken"), (3, "not_taken"), (3, "late"))
            expected.update((impression.request_id, item, outcome) for item, outcome in outcomes)

    for fail_point in ("labels.applied:1", "labels.produced:1", "labels.committed:1"):
        show(fail_point)
        installation.expect_kill(installation.start("ingest", fail_point=fail_point), fail_point)
    join_until(installation, lambda labels: bool(labels["read_up_to_ms"]) and labels["open"] == 0)
    # What comes now is late: corrections, with a crash between sending and committing them.
    late = [
        Event(event_id=f"late-{user}", user_id=user, item_id=3, action="view", event_time=shown_at_ms + user)
        for user in range(num_users)
    ]
    installation.produce(Topics().interactions, [encode_event(event) for event in late])
    installation.expect_kill(installation.start("ingest", fail_point="labels.produced:1"), "labels.produced:1")
    join_until(installation, lambda labels: bool(labels["late"] == 3 * num_users))
    labels = [
        (message.request_id, item, "late" if message.late else message.outcome)
        for message in installation.labels()
        for item in message.items
    ]
    assert set(labels) == expected
    sent_again = {request_id for request_id, item, outcome in labels if labels.count((request_id, item, outcome)) > 1}
    assert any(request_id.startswith("labels.produced") for request_id in sent_again)


def join_until(installation: Installation, is_done: Callable[[dict[str, Any]], bool]) -> None:
    process = installation.start("ingest")

    def ask() -> bool:
        labels = installation.status("ingest").get("labels")
        return labels is not None and is_done(labels)

    installation.wait(ask, "joining everything")
    installation.stop(process)


def test_a_trainer_killed_anywhere_ends_with_the_same_bits_as_one_that_was_not(installation: Installation) -> None:
    installation.send(1_500)
    ingest_everything(installation)
    fail_points = (
        "trainer.trained:7",
        "trainer.checkpoint_written:1",
        "trainer.snapshot_written:2",
        "trainer.trained:5",
    )
    for fail_point in fail_points:
        installation.expect_kill(installation.start("train", fail_point=fail_point), fail_point)
    killed = train_everything(installation, installation.root)
    unbroken = train_everything(installation, installation.root / "unbroken")
    totals = installation.store.totals()
    ledger = killed.state["ledger"]
    assert (ledger["num_interactions"], ledger["fingerprint"]) == (1_500, str(totals.fingerprint))
    assert ledger["num_supervised"] + ledger["num_first"] + ledger["num_out_of_reach"] == 1_500
    assert killed.state == unbroken.state
    assert killed.tensors.keys() == unbroken.tensors.keys()
    for name, tensor in killed.tensors.items():
        # Which rows wait for the next snapshot depends on when snapshots were taken, not on what was learned.
        if name != "items.dirty":
            assert torch.equal(tensor, unbroken.tensors[name]), name
    learned = [
        read_manifest(installation.root / "snapshots", "default", version).lineage.num_interactions
        for version in list_versions(installation.root / "snapshots", "default")
    ]
    assert learned == sorted(learned)
    assert learned[-1] == 1_500
    verified = subprocess.run(
        [sys.executable, "-m", "ops", "verify"],
        env=installation.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    assert "each of the 1,500 stored interactions exactly once" in verified.stdout


def train_everything(installation: Installation, data_dir: Path) -> Checkpoint:
    process = installation.start("train", data_dir=data_dir)
    installation.wait(lambda: installation.status("train").get("interactions") == 1_500, "learning everything")
    installation.stop(process)
    return installation.checkpoint(data_dir)


def test_a_worker_killed_at_a_swap_comes_back_with_the_newest_version(installation: Installation) -> None:
    installation.send(600)
    ingest_everything(installation)
    trainer = installation.start("train")
    installation.expect_kill(installation.start("serve", fail_point="serving.swapped:1"), "serving.swapped:1")
    worker = installation.start("serve")
    installation.wait(lambda: installation.status("train").get("interactions") == 600, "learning everything")
    installation.stop(trainer)
    newest = list_versions(installation.root / "snapshots", "default")[-1]
    installation.wait(
        lambda: installation.status("serve").get("snapshot", {}).get("version") == newest, "serving the newest version"
    )
    address = f"http://127.0.0.1:{installation.ports['serve']}"
    assert httpx.get(f"{address}/readyz").status_code == 200
    answer = httpx.post(f"{address}/v1/recommend", json={"user_id": 1, "k": 5}).json()
    assert answer["snapshot_version"] == newest
    assert answer["fallback"] is False
    assert len(answer["items"]) == 5
    seen = installation.store.read(np.array([1]), max_len=1_000).item_id.tolist()
    assert not {item["item_id"] for item in answer["items"]} & set(seen)
    assert json.dumps(answer)
    installation.stop(worker)
