"""`headrace backtest`: logs of the past, made into recordings."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import dataclasses
import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ops.command_line import ConfigOption, say, settings_of
from ops.errors import OpsError

backtest_app = typer.Typer(help="What online learning would have given on a log of the past.", no_args_is_help=True)


class OnErrorName(StrEnum):
    """What a refused row does."""

    STOP = "stop"
    SKIP = "skip"
    DEAD_LETTER = "dead-letter"


class UnitName(StrEnum):
    """What a column of times counts."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"
    TEXT = "text"


FormatArgument = Annotated[str, typer.Argument(metavar="FORMAT", help="See `headrace backtest formats`.")]
PathsArgument = Annotated[list[Path] | None, typer.Argument(metavar="PATH…", help="Files, or folders of them.")]
UserOption = Annotated[str | None, typer.Option("--user-col", help="Column of the user id; user_id.")]
ItemOption = Annotated[str | None, typer.Option("--item-col", help="Column of the item id; item_id.")]
TimeOption = Annotated[str | None, typer.Option("--time-col", help="Column of the event time; event_time.")]
UnitOption = Annotated[UnitName | None, typer.Option("--time-unit", help="What times count; text: RFC 3339.")]
TimeFormatOption = Annotated[str | None, typer.Option("--time-format", help="How times are written (strptime).")]
RelativeOption = Annotated[bool, typer.Option("--relative-time", help="Times do not count from 1970.")]
ArrivalOption = Annotated[str | None, typer.Option("--arrival-col", help="Column of the arrival time.")]
ValueOption = Annotated[str | None, typer.Option("--value-col", help="Column of a rating, watch seconds …")]
SurfaceOption = Annotated[
    str | None, typer.Option("--surface-col", help="Column of where it happened (events.surface_key).")
]
EventIdOption = Annotated[str | None, typer.Option("--event-id-col", help="Column of the event id; the row number.")]
ActionColumnOption = Annotated[str | None, typer.Option("--action-col", help="Column of the action.")]
ActionOption = Annotated[str | None, typer.Option("--action", help="Action of events without one; rating.")]
UserIdsOption = Annotated[str | None, typer.Option("--user-ids", help="integer or text; as the file types them.")]
ItemIdsOption = Annotated[str | None, typer.Option("--item-ids", help="integer or text; as the file types them.")]
OnErrorOption = Annotated[OnErrorName, typer.Option("--on-error", help="What a refused row does.")]


@backtest_app.command("formats")
def backtest_formats() -> None:
    """List the formats that can be imported."""
    from backtest.formats import FORMATS

    for one in FORMATS.values():
        print(f"{one.name:<15} {one.summary}")


@backtest_app.command("import")
def backtest_import(
    format_name: FormatArgument,
    paths: PathsArgument = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the recording.")] = Path("recording"),
    user: UserOption = None,
    item: ItemOption = None,
    time: TimeOption = None,
    time_unit: UnitOption = None,
    time_format: TimeFormatOption = None,
    arrival: ArrivalOption = None,
    value: ValueOption = None,
    surface: SurfaceOption = None,
    event_id: EventIdOption = None,
    action: ActionColumnOption = None,
    default_action: ActionOption = None,
    user_ids: UserIdsOption = None,
    item_ids: ItemIdsOption = None,
    on_error: OnErrorOption = OnErrorName.STOP,
    config: ConfigOption = None,
    *,
    relative_time: RelativeOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a recording of a log: checked, in order of time, ready for `headrace backtest run`."""
    from backtest.importing import import_files
    from backtest.intake import ImportConfig

    files = _files(format_name, paths, locals())
    recording = import_files(files, out, ImportConfig(on_error=on_error.value), name=_name(files))
    _print(recording.manifest.report, config, as_json=as_json)
    say(f"headrace: wrote {out}, {len(recording):,} events")


@backtest_app.command("validate")
def backtest_validate(
    format_name: FormatArgument,
    paths: PathsArgument = None,
    user: UserOption = None,
    item: ItemOption = None,
    time: TimeOption = None,
    time_unit: UnitOption = None,
    time_format: TimeFormatOption = None,
    arrival: ArrivalOption = None,
    value: ValueOption = None,
    surface: SurfaceOption = None,
    event_id: EventIdOption = None,
    action: ActionColumnOption = None,
    default_action: ActionOption = None,
    user_ids: UserIdsOption = None,
    item_ids: ItemIdsOption = None,
    config: ConfigOption = None,
    *,
    relative_time: RelativeOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is in a log and what is wrong with it, row by row; exit 1 if a row would be refused."""
    from backtest.importing import validate_files
    from backtest.intake import ImportConfig

    report = validate_files(_files(format_name, paths, locals()), ImportConfig())
    _print(report, config, as_json=as_json)
    raise typer.Exit(1 if report.num_refused else 0)


@backtest_app.command("import-topic")
def backtest_import_topic(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="By default interactions.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the recording.")] = Path("recording"),
    since: Annotated[str | None, typer.Option("--from", help="Records appended since then (RFC 3339).")] = None,
    on_error: OnErrorOption = OnErrorName.STOP,
    config: ConfigOption = None,
) -> None:
    """Make a recording of what a topic of the broker holds, in the order in which it arrived."""
    import asyncio

    from backtest.import_text import report_text
    from backtest.intake import ImportConfig
    from backtest.topic_import import import_topic
    from stream.events import EventRules
    from stream.kafka import KafkaConfig, KafkaLog

    settings = settings_of(config)
    log, rules = KafkaLog(settings.get(KafkaConfig)), settings.get(EventRules)
    how = ImportConfig(on_error=on_error.value)
    chosen = topic or log.topics.interactions
    recording = asyncio.run(import_topic(log, chosen, out, how, rules, from_ms=_epoch_ms(since)))
    print(report_text(recording.manifest.report, rules))
    say(f"headrace: wrote {out}, {len(recording):,} events")


def _epoch_ms(text: str | None) -> int:
    if text is None:
        return 0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = datetime.min  # noqa: DTZ901 - refused below, having no offset
    if moment.tzinfo is None:
        raise OpsError(f"--from {text}: write RFC 3339 with an offset, such as 2026-01-01T00:00:00Z")
    return round(moment.timestamp() * 1000)


@backtest_app.command("run")
def backtest_run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings, with [source] and [backtest].")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME.")] = None,
    *,
    restart: Annotated[bool, typer.Option("--restart", help="Make it anew, whatever is there.")] = False,
    through_broker: Annotated[
        bool, typer.Option("--through-broker", help="Then the same through a local broker and the daemons; compare.")
    ] = False,
) -> None:
    """Replay a log through the live code and compare arms; goes on where it was interrupted."""
    from ops.backtest_run import Asked, run_backtest

    asked = Asked(config=config, out=out, restart=restart, through_broker=through_broker)
    raise typer.Exit(run_backtest(asked, say=say, show=print))


@backtest_app.command("at")
def backtest_at(
    moment: Annotated[str, typer.Argument(metavar="MOMENT", help="Event time, such as 2017-10-05T12:00; UTC.")],
    user: Annotated[str, typer.Option("--user", help="The user's id: a number, or a text.")],
    run: Annotated[Path, typer.Option("--run", help="Folder of the run.")] = Path("runs/backtest"),
    count: Annotated[int, typer.Option("--history", min=1, help="Newest interactions shown.")] = 20,
    *,
    as_text: Annotated[bool, typer.Option("--text", help="The id is a text, though it looks like a number.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show a run as it was at a moment: a user's history, the weights, and what they would have recommended."""
    from ops.backtest_at import moment_lines, moment_of, moment_to_json

    found = moment_of(run, moment, user, count=count, as_text=as_text)
    for line in [moment_to_json(found)] if as_json else moment_lines(found, count):
        print(line)


def _files(format_name: str, paths: list[Path] | None, options: dict[str, Any]) -> Any:
    """The files to read, from the options of a command."""
    from backtest.columns import ColumnMapping
    from backtest.formats import files_of

    said = {one.name: options.get(one.name) for one in dataclasses.fields(ColumnMapping)}
    said["time_unit"] = said["time_unit"].value if said["time_unit"] else None
    said["relative_time"] = said["relative_time"] or None
    try:
        return files_of(format_name, paths or [], **said)
    except ValueError as error:
        raise OpsError(str(error)) from error


def _name(files: Any) -> str:
    return files[0].paths[0].name.split(".")[0][:64] or "log"


def _print(report: Any, config: Path | None, *, as_json: bool) -> None:
    from backtest.import_text import report_text
    from stream.events import EventRules

    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(report_text(report, settings_of(config).get(EventRules)))
