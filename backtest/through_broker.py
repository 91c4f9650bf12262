"""The same log through a real broker, the ingest worker and the trainer daemon: a replay in one process must equal it.

The log is poured in and committed first; then the trainer starts, with everything waiting. So its batches are full, as
those of a replay are, and only the last closes because nothing more comes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from backtest.event_columns import EventColumns, EventSource
from backtest.fingerprints import histories_fingerprint, learner_fingerprints
from backtest.run import RunSettings
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from online_trainer.checkpoint import read_newest_checkpoint
from online_trainer.daemon import TrainerDaemon
from online_trainer.parts import TrainerParts
from stream.clock import WallClock
from stream.commit import Committer
from stream.errors import LogUnavailableError
from stream.events import EventDecoder, encode_event
from stream.ingest import IngestConfig, IngestWorker
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged

_QUIET_MS: Final = 3_000
"""After so long without anything new the trainer closes its last batch. Longer than a busy machine's pauses."""
_IN_FLIGHT_MAX: Final = 5_000
_LOOK_S: Final = 0.1


def refuse_what_differs(settings: RunSettings) -> None:
    """Raises ValueError for settings that no broker can follow: it has the machine's clock."""
    if settings.arrivals.delay_ms or settings.arrivals.clock_skew_ms:
        raise ValueError("--through-broker: delays and wrong clocks are simulated without a broker only ([arrivals])")
    if settings.upstream is not None:
        raise ValueError(
            "--through-broker: upstream_daemon.is_on, and when a daemon computes a vector depends on the machine's "
            "clock; set it to false"
        )
    if settings.backtest.batch_wait != "never":
        raise ValueError(
            f"--through-broker: backtest.batch_wait = {settings.backtest.batch_wait} is event time, and a daemon waits "
            "by the machine's clock: set never"
        )


async def fingerprints_through_broker(
    settings: RunSettings, source: EventSource, kafka: KafkaConfig, root: Path, *, timeout_s: float
) -> dict[str, str]:
    """`histories`, `weights` and `metrics` of the daemons, with their files below `root`, which exists and is empty.

    `kafka` names a broker whose topics are empty, with one partition. Raises LogUnavailableError when the broker is
    away or the daemons have not come to the end of the log after `timeout_s`.
    """
    log = KafkaLog(kafka)
    await log.create_topics()
    users, num_events = await _pour(settings, source, log)
    url = f"sqlite:///{root}/store.db"
    migrate(url)
    store = FeatureStore(replace(settings.store, url=url))
    try:
        num_accepted = await _ingested(settings, store, log, kafka, num_events, timeout_s)
        await _trained(settings, store, log, root, num_accepted, timeout_s)
        histories = histories_fingerprint(store, users)
    finally:
        store.close()
    checkpoint = read_newest_checkpoint(root / "checkpoints", config_hash=settings.learner.model.config_hash())
    assert checkpoint is not None, "the trainer writes one when it stops"
    return {"histories": histories, **learner_fingerprints(checkpoint.tensors)}


async def _pour(settings: RunSettings, source: EventSource, log: KafkaLog) -> tuple[NDArray[np.int64], int]:
    """Users, and how many events were sent."""
    limit = settings.backtest.limit or None
    writer, users, num_events = log.writer(), [], 0
    in_flight: deque[Awaitable[object]] = deque()
    await writer.start()
    try:
        for batch in source.batches(_IN_FLIGHT_MAX, end=limit):
            events = EventColumns.of(batch)
            users.append(np.unique(events.user_id))
            num_events += len(events)
            for row in range(len(events)):
                value = encode_event(events.as_event(row, settings.rules.surface_key))
                in_flight.append(await writer.send(log.topics.interactions, value, partition=0))
            await acknowledged(in_flight)
            in_flight.clear()
    finally:
        await writer.stop()
    return np.concatenate(users), num_events


async def _ingested(
    settings: RunSettings, store: FeatureStore, log: KafkaLog, kafka: KafkaConfig, num_events: int, timeout_s: float
) -> int:
    """Run an ingest worker to the end of the log; how many events it accepted."""
    writer = log.writer()
    await writer.start()
    committer = Committer(
        store=store,
        writer=writer,
        topics=log.topics,
        log_id=log.log_id,
        decoder=EventDecoder(settings.rules),
        clock=WallClock(),
        mode="replay",
    )
    worker = IngestWorker(IngestConfig(), kafka, log.topics, committer)
    stopping = asyncio.Event()
    running = asyncio.create_task(worker.run(stopping))
    try:
        await _until(lambda: sum(worker.positions().values()) >= num_events, running, timeout_s, "ingest")
    finally:
        stopping.set()
        await running
        committer.close()
        await writer.stop()
    return committer.counts.num_accepted


async def _trained(
    settings: RunSettings, store: FeatureStore, log: KafkaLog, root: Path, num_accepted: int, timeout_s: float
) -> None:
    learner = settings.learner
    daemon = TrainerDaemon(
        TrainerParts(
            config=replace(learner.trainer, batch_wait_ms=_QUIET_MS),
            items_config=learner.items,
            model_config=learner.model,
            loss_config=learner.loss,
            optimizer_config=learner.optimizer,
            drift_config=learner.drift,
            actions=learner.actions,
            ranking=learner.ranking,
            model_name="through-broker",
            log=log,
            store=store,
            hot_config=settings.hot,
            snapshot_root=root / "snapshots",
            checkpoint_root=root / "checkpoints",
            quarantine_root=root / "quarantine",
            metrics_root=root / "metrics",
            clock=WallClock(),
            mode="replay",
        )
    )
    stopping = asyncio.Event()
    running = asyncio.create_task(daemon.run(stopping))
    try:
        await _until(lambda: daemon.status()["interactions"] == num_accepted, running, timeout_s, "the trainer")
    finally:
        stopping.set()
        await running


async def _until(is_done: Callable[[], bool], running: asyncio.Task[None], timeout_s: float, what: str) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not is_done():
                if running.done():
                    running.result()
                    break
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise LogUnavailableError(f"{what} has not come to the end of the log after {timeout_s:.0f} s") from None
