"""The steps of the demo, from the first process to the last check. Each returns when its claim is true, or raises."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import httpx

from backtest.replay import RecordedStream, ReplayConfig, ReplayProgress, replay
from feature_store.store import FeatureStore
from model.upstream_config import UpstreamConfig
from online_trainer.upstream_settings import UpstreamDaemonConfig
from ops.config import HeadraceConfig
from ops.demo import checks
from ops.demo.change import ChangeParts, ChangeReport, show_change
from ops.demo.checks import Check, Truth
from ops.demo.plan import HOST, SERVING_NAMES, DemoError, Plan
from ops.demo.watch import Watcher, log_tail
from ops.supervisor import Supervisor
from stream.clock import WallClock
from stream.kafka import KafkaConfig, KafkaLog
from stream.log import acknowledged
from stream.messages import ItemMessage, encode_message

EVENT_ID_PREFIX: Final = "movietweetings"
_START_TIMEOUT_S: Final = 120.0
_STALLED_S: Final = 45.0
"""Without a single event stored, learned or served for so long, something hangs."""
_SETTLE_S: Final = 5.0
_VECTORS_S: Final = 30.0
_TICK_MS: Final = 100.0
"""About seventy events a tick. Ingest commits whatever is there: with one event at a time it would commit so often that
two cores had less time left for learning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """Everything that is up."""

    plan: Plan
    recorded: RecordedStream
    watcher: Watcher
    store: FeatureStore
    client: httpx.AsyncClient
    supervisor: Supervisor
    say: Callable[[str], None]
    """Tells the person at the terminal what is going on now."""

    def log(self) -> KafkaLog:
        """The log at the local broker."""
        return KafkaLog(self.plan.settings.get(KafkaConfig))

    def log_tail(self, name: str) -> str:
        """The end of a process's log, for a message about it."""
        return log_tail(self.plan.options.log_dir / f"{name}.log")


async def until_ready(running: Running) -> None:
    """Wait until ingest and trainer are ready and the workers listen (they are ready with the first weights)."""
    upstream = "the upstream daemon " if running.plan.options.has_upstream else ""
    running.say(f"starting ingest, the trainer, {upstream}and two inference workers")
    ports = running.plan.ports
    waiting = {
        "ingest": f"http://{HOST}:{ports.ingest}/readyz",
        "trainer": f"http://{HOST}:{ports.trainer}/readyz",
        **({"upstream": f"http://{HOST}:{ports.upstream}/readyz"} if running.plan.options.has_upstream else {}),
    }
    waiting |= {name: f"{url}/livez" for name, url in zip(SERVING_NAMES, ports.serving_urls(), strict=True)}
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while waiting:
        for name, url in list(waiting.items()):
            with contextlib.suppress(httpx.HTTPError):
                if (await running.client.get(url)).status_code == httpx.codes.OK:
                    del waiting[name]
        if time.monotonic() > deadline_s:
            name = next(iter(waiting))
            raise DemoError(f"{name} was not ready within {_START_TIMEOUT_S:.0f} s{running.log_tail(name)}")
        await asyncio.sleep(0.25)


async def publish_titles(running: Running) -> int:
    """Titles and genres of every film of the stream, to the `items` topic; how many there are."""
    titles, log = running.plan.titles, running.log()
    item_ids = sorted(set(map(int, running.recorded.item_id)) & set(titles))
    running.say(f"publishing {len(item_ids):,} titles to the items topic")
    writer = log.writer()
    await writer.start()
    try:
        sends: list[Awaitable[object]] = []
        for item_id in item_ids:
            title = titles[item_id]
            message = ItemMessage(item_id=item_id, title=title.title, categories=list(title.genres))
            sends.append(await writer.send(log.topics.items, encode_message(message), key=str(item_id).encode()))
        await acknowledged(sends)
    finally:
        await writer.stop()
    return len(item_ids)


async def replay_stream(running: Running) -> None:
    """Send the recorded stream in event order at an accelerated clock."""
    recorded, watcher, log = running.recorded, running.watcher, running.log()
    span_s = float(recorded.event_time_ms[-1] - recorded.event_time_ms[0]) / 1000
    speed = span_s / running.plan.options.replay_s
    running.say(
        f"replaying {len(recorded):,} ratings {speed:,.0f} times as fast as they happened, learning from each of them"
    )

    def note(progress: ReplayProgress) -> None:
        watcher.num_sent, watcher.event_time_ms = progress.num_sent, progress.event_time_ms

    config = ReplayConfig(
        action=running.plan.dataset.action,
        speed=speed,
        event_id_prefix=EVENT_ID_PREFIX,
        tick_ms=_TICK_MS,
        progress_interval_s=0.2,
    )
    writer = log.writer()
    await writer.start()
    try:
        await replay(recorded, writer, log.topics.interactions, config, clock=WallClock(), on_progress=note)
    finally:
        await writer.stop()
    watcher.num_sent, watcher.event_time_ms = len(recorded), int(recorded.event_time_ms[-1])


async def until_learned(running: Running, wanted: int) -> None:
    """Wait until the weights in service have learned from everything. Raises DemoError when nothing moves."""
    running.say("everything is sent: waiting until the last of it is learned and in service")
    best, best_at_s = -1, time.monotonic()
    while True:
        sample = running.watcher.newest
        served = [worker.learned_interactions or 0 for worker in sample.workers]
        if sample.num_learned >= wanted and min(served, default=0) >= wanted:
            return
        reached = sample.num_stored + sample.num_learned + sum(served)
        if reached > best:
            best, best_at_s = reached, time.monotonic()
        elif time.monotonic() - best_at_s > _STALLED_S:
            stuck = (
                "ingest" if sample.num_stored < wanted else "trainer" if sample.num_learned < wanted else "serving-a"
            )
            raise DemoError(
                f"nothing has moved for {_STALLED_S:.0f} s: {sample.num_stored:,} of {wanted:,} events stored, "
                f"{sample.num_learned:,} learned, {min(served, default=0):,} in service{running.log_tail(stuck)}"
            )
        await asyncio.sleep(0.1)


async def change_a_user(running: Running, num_interactions: int) -> ChangeReport:
    """One user's recommendations before and after a few new events."""
    running.say("a user of new films likes a few classics: asking both workers until they have learned from it")
    recorded = running.recorded
    return await show_change(
        ChangeParts(
            client=running.client,
            urls=running.plan.ports.serving_urls(),
            store=running.store,
            user_ids=list(map(int, recorded.user_id)),
            item_ids=list(map(int, recorded.item_id)),
            ends_ms=int(recorded.event_time_ms[-1]),
            titles=running.plan.titles,
            num_interactions=num_interactions,
        )
    )


async def compare(running: Running, truth: Truth, num_titles: int) -> list[Check]:
    """Compare what is stored, learned and answered with the truth."""
    running.say("comparing everything with the recorded stream")
    watcher, store, recorded = running.watcher, running.store, running.recorded
    assert watcher.load is not None, "the background load runs"
    await _until_figures_arrived(watcher, truth)
    totals = await asyncio.to_thread(store.totals)
    items = await asyncio.to_thread(store.items, sorted(set(map(int, recorded.item_id))))
    urls = running.plan.ports.serving_urls()
    return [
        checks.check_histories(truth, totals),
        checks.check_learned(totals, watcher.status("trainer")),
        checks.check_served(truth, watcher.newest),
        await checks.check_answers(running.client, urls, recorded.user_id, watcher.load),
        checks.check_requests(watcher.load, watcher.newest),
        checks.check_refusals(watcher.status("ingest")),
        checks.check_titles(len(items), num_titles),
        checks.check_processes(running.supervisor.status()),
        *([await _check_vectors(running)] if running.plan.options.has_upstream else []),
    ]


async def _check_vectors(running: Running) -> Check:
    """Of the last users to do something, vectors come after the debounce."""
    settings, deadline_s = running.plan.settings, time.monotonic() + _VECTORS_S
    while True:
        check = await asyncio.to_thread(
            checks.check_vectors,
            running.store,
            model=settings.get(HeadraceConfig).model,
            width=settings.get(UpstreamConfig).width,
            max_age_ms=round(settings.get(UpstreamDaemonConfig).backfill_max_age_d * 86_400_000),
        )
        if check.is_ok or time.monotonic() > deadline_s:
            return check
        await asyncio.sleep(0.5)


async def _until_figures_arrived(watcher: Watcher, truth: Truth) -> None:
    """Let the last figures arrive; what has not by then fails the checks with its own words."""
    deadline_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline_s:
        known, sample = watcher.snapshots, watcher.newest
        counts = {sample.num_learned, *(worker.learned_interactions for worker in sample.workers)}
        if known is not None and counts == {known.answered.append.count} == {truth.num_interactions}:
            return
        await asyncio.sleep(0.1)
