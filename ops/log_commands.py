"""`headrace log`: the commands. They read options and print."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import asyncio
from typing import Annotated

import typer

from ops.command_line import ConfigOption, open_store, say, settings_of
from ops.errors import OpsError

log_app = typer.Typer(help="Where ingest stands in the log, and going on after a loss.", no_args_is_help=True)


@log_app.command("status")
def log_status(
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Per partition of `interactions`: stored position, log start and end, lag, verdict; exit 1 if records are lost."""
    from ops.log_positions import read_status
    from stream.kafka import KafkaConfig, KafkaLog

    settings = settings_of(config)
    with open_store(settings) as store:
        status = asyncio.run(read_status(KafkaLog(settings.get(KafkaConfig)), store))
    print(status.to_json() if as_json else status.to_text())
    raise typer.Exit(0 if status.is_whole else 1)


@log_app.command("accept")
def log_accept(
    config: ConfigOption = None,
    *,
    truncated: Annotated[bool, typer.Option("--truncated", help="Give up what was deleted unread.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Go on with a log that was made anew.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would be done.")] = False,
) -> None:
    """Go on after the log has lost records; says what is given up."""
    from ops.log_positions import accept_reset, accept_truncated
    from stream.kafka import KafkaConfig, KafkaLog

    if truncated == reset:
        raise OpsError("give one of --truncated and --reset: `headrace log status` says which it is")
    settings = settings_of(config)
    accept = accept_truncated if truncated else accept_reset
    with open_store(settings) as store:
        sentences = asyncio.run(accept(KafkaLog(settings.get(KafkaConfig)), store, is_dry_run=not yes))
    print("\n".join(sentences or ["nothing is lost"]))
    if not yes:
        say("headrace: nothing was changed; add --yes to do this")
