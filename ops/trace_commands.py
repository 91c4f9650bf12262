"""`headrace trace`: the command. It reads options and prints."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import asyncio
import json
import re
from dataclasses import replace
from typing import Annotated, Final

import typer

from ops.command_line import ConfigOption, open_store, say, settings_of
from ops.errors import OpsError

_UNITS_MS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def trace(
    event_id: Annotated[str, typer.Argument(metavar="EVENT_ID", help="As producers send it.")],
    user: Annotated[
        str | None,
        typer.Option(help="Number or text of its user: only that history is read, instead of searching all of them."),
    ] = None,
    since: Annotated[
        str, typer.Option(help="How far back to search the log for an event that no history holds: 90s, 30m, 24h, 7d.")
    ] = "24h",
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Follow one event from its producer to the first answer; exit 1 if it has not come that far (yet)."""
    from online_trainer.config import TrainerConfig
    from ops.config import HeadraceConfig
    from ops.event_lookup import LookupParts, look_up
    from ops.event_path import text_of
    from ops.snapshot_store import snapshot_storage
    from ops.user_history import user_ids_meant
    from stream.clock import WallClock
    from stream.kafka import KafkaConfig, KafkaLog

    settings, clock = settings_of(config), WallClock()
    since_ms = clock.now_ms() - _duration_ms(since)
    with open_store(settings) as store:
        kafka = settings.get(KafkaConfig)
        parts = LookupParts(
            store=store,
            log=KafkaLog(replace(kafka, log_id=store.current_log_id(kafka.log_id))),
            snapshots=snapshot_storage(settings),
            model=settings.get(HeadraceConfig).model,
            clock=clock,
            replica_timeout_ms=round(settings.get(TrainerConfig).replica_timeout_s * 1000),
            say=lambda text: say(f"headrace: {text}"),
        )
        users = None if user is None else user_ids_meant(user)
        traced = asyncio.run(look_up(parts, event_id, users, since_ms=since_ms))
    if as_json:
        print(json.dumps(traced.to_dict(), indent=2))
    elif text := text_of(traced):
        print(text)
    for note in traced.notes:
        say(f"headrace: {note}")
    if not (traced.paths or traced.refused or traced.sent):
        where = "no history" if user is None else f"no history of user {user!r}"
        say(f"headrace: event {event_id!r} is in {where}, in no dead letter, and not in the log of the last {since}")
    raise typer.Exit(0 if traced.is_complete else 1)


def _duration_ms(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise OpsError(f"--since {text}: give a number and a unit, such as 90s, 30m, 24h or 7d")
    return int(found[1]) * _UNITS_MS[found[2]]
