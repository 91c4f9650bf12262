"""Joins a recorded stream to the broker of the settings, and tells a person how far it is."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from typing import Any

from backtest.replay import RecordedStream, ReplayConfig, ReplayProgress, replay
from ops.errors import SettingsError
from ops.readable import utc_time
from ops.settings import Settings
from stream.clock import WallClock
from stream.events import EventRules
from stream.kafka import KafkaConfig, KafkaLog


async def replay_to_kafka(
    settings: Settings,
    recorded: RecordedStream,
    config: ReplayConfig,
    *,
    bootstrap: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Replay to the broker until done, SIGTERM or SIGINT; returns the report as plain values. Surfaces are sent under
    events.surface_key.

    Raises SettingsError for an action that ingest would refuse, or surfaces that it would not look at,
    LogUnavailableError when the broker is away.
    """
    rules = settings.get(EventRules)
    if config.action not in rules.actions:
        raise SettingsError(
            f"--action {config.action}: ingest would refuse every event; events.actions are {', '.join(rules.actions)}"
        )
    if recorded.surface is not None and not rules.surface_key:
        raise SettingsError("--surface-col: set events.surface_key and events.surfaces, or ingest would not keep it")
    config = dataclasses.replace(config, surface_key=rules.surface_key)
    kafka = settings.get(KafkaConfig)
    log = KafkaLog(dataclasses.replace(kafka, bootstrap_servers=bootstrap) if bootstrap else kafka)
    await log.create_topics()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    writer = log.writer()
    await writer.start()
    try:
        report = await replay(
            recorded,
            writer,
            log.topics.interactions,
            config,
            clock=WallClock(),
            stopping=stopping,
            on_progress=lambda progress: say(progress_line(progress)),
        )
    finally:
        await writer.stop()
    return dataclasses.asdict(report)


def progress_line(progress: ReplayProgress) -> str:
    """One line for a person."""
    share = progress.num_sent / max(progress.num_events, 1)
    return (
        f"replay: {progress.num_sent:,} of {progress.num_events:,} events ({share:.0%}), "
        f"{progress.events_per_s:,.0f} events/s, event time {utc_time(progress.event_time_ms)}"
    )
