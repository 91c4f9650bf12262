"""`headrace`: the command line. It reads options and calls the rooms; it holds no logic of its own.

Exit status: 0 done, 1 failed, 2 refused (an option, a setting, a port, a file: only a person can mend it).
"""

# No `from __future__ import annotations`: typer reads the annotations of local commands at run time.

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from backtest.errors import BacktestError
from feature_store.errors import FeatureStoreError, SchemaRevisionError, StoreLayoutError
from model.errors import ItemTableFullError, SnapshotError
from online_trainer.errors import CheckpointError, CheckpointMismatchError, UpstreamFencedError
from ops.backtest_commands import backtest_app
from ops.backtest_report_commands import backtest_compare, backtest_report
from ops.command_line import ConfigOption, say, settings_of
from ops.errors import OpsError
from ops.freshness_commands import freshness
from ops.log_commands import log_app
from ops.settings import Settings
from ops.simulate_commands import simulate
from ops.snapshot_commands import snapshots_app
from ops.store_commands import store_app
from ops.token_commands import token_app
from ops.trace_commands import trace
from ops.trainer_commands import trainer_app
from ops.user_commands import user_app
from serving.errors import ListenRefusedError, PortTakenError
from stream.errors import LogResetError, StreamError

_REFUSALS: Final = (
    OpsError,
    BacktestError,
    SchemaRevisionError,
    StoreLayoutError,
    LogResetError,
    CheckpointError,
    CheckpointMismatchError,
    ItemTableFullError,
    UpstreamFencedError,
    PortTakenError,
    ListenRefusedError,
)
"""Trying again cannot help: exit status 2."""

app = typer.Typer(
    name="headrace",
    help="A streaming online-learning recommender: events in from Kafka, fresh weights in serving seconds later.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show the settings in effect, or print the commented file.", no_args_is_help=True)
app.add_typer(config_app, name="config")
dlq_app = typer.Typer(help="Dead letters: list them, look at one, send them back.", no_args_is_help=True)
app.add_typer(dlq_app, name="dlq")
app.add_typer(user_app, name="user")
app.add_typer(store_app, name="store")
app.add_typer(log_app, name="log")
app.add_typer(trainer_app, name="trainer")
app.add_typer(snapshots_app, name="snapshots")
app.add_typer(token_app, name="token")
app.add_typer(backtest_app, name="backtest")
backtest_app.command("report")(backtest_report)
backtest_app.command("compare")(backtest_compare)
app.command()(freshness)
app.command()(simulate)
app.command()(trace)


class TimeUnit(StrEnum):
    """How a recorded file counts time."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    RFC3339 = "rfc3339"


@config_app.command("show")
def config_show(
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print every setting, its value, and where the value came from."""
    effective = settings_of(config).effective()
    if as_json:
        print(json.dumps({one.key: {"value": one.value, "origin": one.origin} for one in effective}, indent=2))
        return
    shown = [(f"{one.key} = {json.dumps(one.value, ensure_ascii=False)}", one.origin) for one in effective]
    width = min(60, max(len(text) for text, _ in shown))
    for text, origin in shown:
        print(f"{text:<{width}}  # {origin}")


@config_app.command("template")
def config_template() -> None:
    """Print headrace.toml with every key, its reason and its default."""
    from ops.settings_template import template

    print(template(), end="")


ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only this reason code.")]


@dlq_app.command("ls")
def dlq_ls(
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per letter.")] = False,
) -> None:
    """List dead letters: place, time, reason, source and first bytes."""
    import asyncio

    from ops.dlq import list_letters
    from stream.redrive import LetterQuery

    query = _checked(lambda: LetterQuery(reason=reason, limit=limit))
    settings = settings_of(config)

    async def print_lines() -> None:
        async for line in list_letters(settings, query, as_json=as_json, say=say):
            print(line)

    asyncio.run(print_lines())


@dlq_app.command("show")
def dlq_show(
    place: Annotated[str, typer.Argument(metavar="PARTITION:OFFSET", help="As `headrace dlq ls` prints it.")],
    config: ConfigOption = None,
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Only the original bytes, as they are.")] = False,
) -> None:
    """Print one dead letter: why it was refused, its headers, and the original bytes."""
    import asyncio

    from ops.dlq import find_record, record_text

    record = asyncio.run(find_record(settings_of(config), place))
    if raw:
        sys.stdout.buffer.write(record.value or b"")
    else:
        print(record_text(record))


@dlq_app.command("redrive")
def dlq_redrive(
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option(help="Send at most so many.")] = None,
    config: ConfigOption = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Send nothing; say what would be sent.")] = False,
) -> None:
    """Send dead letters back to the topics they came from, each once."""
    import asyncio

    from ops.dlq import report_sentence, send_back
    from stream.redrive import LetterQuery

    query = _checked(lambda: LetterQuery(reason=reason, limit=limit))
    report = asyncio.run(send_back(settings_of(config), query, is_dry_run=dry_run, say=say))
    print(report_sentence(report, is_dry_run=dry_run))


@app.command()
def migrate(
    config: ConfigOption = None,
    *,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 2 if the schema is another.")] = False,
) -> None:
    """Bring the database schema up to date (SQLite: creates the file)."""
    from feature_store import schema
    from feature_store.config import FeatureStoreConfig
    from ops.settings import masked

    url = settings_of(config).get(FeatureStoreConfig).url
    if check:
        schema.check(url)
    else:
        schema.migrate(url)
    print(f"{masked('url', url)}: schema revision {schema.current(url)}")


@app.command()
def broker(
    port: Annotated[int, typer.Option(help="TCP port.")] = 9092,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Run the local in-memory broker, for trying headrace out; its log is gone when it stops."""
    from ops.local_broker import LocalBrokerConfig, become_broker

    become_broker(_checked(lambda: LocalBrokerConfig(host=host, port=port)))


@app.command()
def ingest(config: ConfigOption = None) -> None:
    """Run an ingest worker: `interactions` -> durable histories."""
    from ops import daemons

    _run_daemon(settings_of(config), daemons.ingest)


@app.command()
def train(config: ConfigOption = None) -> None:
    """Run the online trainer: histories -> snapshots."""
    from ops import daemons

    _run_daemon(settings_of(config), daemons.train)


@app.command()
def upstream(config: ConfigOption = None) -> None:
    """Run the upstream daemon: histories -> vectors of users, which the ranker reads."""
    from ops import daemons

    _run_daemon(settings_of(config), daemons.upstream)


@app.command()
def serve(
    config: ConfigOption = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; by default serving.port.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="So many processes, on ports from this one on.")] = 1,
) -> None:
    """Run an inference worker, or several: HTTP API on the newest snapshot."""
    from ops import daemons
    from serving.config import ServingConfig

    settings = settings_of(config)
    if workers > 1:
        _run_workers(settings, workers, port, config)
        return
    chosen = settings.get(ServingConfig).port if port is None else port
    _run_daemon(settings, lambda known: daemons.serve(known, chosen))


@app.command()
def up(
    config: ConfigOption = None,
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Inference workers, on consecutive ports.")] = 1,
    port: Annotated[int | None, typer.Option(help="Port of the first; by default serving.port.")] = None,
    *,
    local_broker: Annotated[bool, typer.Option("--local-broker", help="Start the in-memory broker too.")] = False,
    log_files: Annotated[bool, typer.Option("--log-files", help="Write logs to <data_dir>/logs instead.")] = False,
) -> None:
    """Run everything on this machine, supervised: ingest, trainer, upstream daemon if it is on, inference workers."""
    from ops.config import HeadraceConfig
    from ops.supervisor import Supervisor, SupervisorConfig
    from ops.up import UpOptions, addresses, children, prepare_database, serving_ports

    settings = settings_of(config)
    _log_to_stderr(settings)
    options = UpOptions(num_replicas=replicas, first_port=port, has_local_broker=local_broker, config_path=config)
    processes = children(settings, options)
    if prepare_database(settings):
        print("up | built the schema in an empty database")
    for line in addresses(settings, serving_ports(settings, options)):
        print(f"up | {line}")
    log_dir = settings.get(HeadraceConfig).data_dir / "logs" if log_files else None
    Supervisor(processes, SupervisorConfig(log_dir=log_dir), write_line=lambda line: print(line, flush=True)).run()


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="Recorded stream, .parquet or .csv, in any row order.")],
    user_col: Annotated[str, typer.Option(help="Column of the user id (integer or text).")],
    item_col: Annotated[str, typer.Option(help="Column of the item id (integer or text).")],
    time_col: Annotated[str, typer.Option(help="Column of the event time.")],
    time_unit: Annotated[TimeUnit, typer.Option(help="How --time-col counts.")] = TimeUnit.MILLISECONDS,
    value_col: Annotated[str | None, typer.Option(help="Column of a rating, watch seconds or the like.")] = None,
    action: Annotated[str, typer.Option(help="Action of every event; declared in events.actions.")] = "rating",
    event_id_col: Annotated[str | None, typer.Option(help="Column of the event id; by default the row number.")] = None,
    surface_col: Annotated[str | None, typer.Option(help="Column of where it happened (events.surface_key).")] = None,
    speed: Annotated[str, typer.Option(help="Event time per real time, such as 1000x, or max.")] = "max",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many events.")] = None,
    bootstrap: Annotated[str | None, typer.Option(help="Broker; by default log.bootstrap_servers.")] = None,
    config: ConfigOption = None,
) -> None:
    """Feed a recorded stream to the broker in event-time order. Ends with one line of JSON."""
    import asyncio

    from backtest.datasets import RecordedColumns
    from backtest.replay import ReplayConfig, parse_speed, read_recorded
    from ops.replaying import replay_to_kafka

    options = _checked(
        lambda: ReplayConfig(action=action, speed=parse_speed(speed), event_id_prefix=file.stem[:64] or "replay")
    )
    columns = RecordedColumns(
        user=user_col,
        item=item_col,
        time=time_col,
        time_unit=time_unit.value,
        value=value_col,
        surface=surface_col,
        event_id=event_id_col,
    )
    settings = settings_of(config)
    recorded = read_recorded(file, columns, limit=limit)
    report = asyncio.run(replay_to_kafka(settings, recorded, options, bootstrap=bootstrap, say=say))
    print(json.dumps(report))


@app.command()
def demo(
    minutes: Annotated[float | None, typer.Option(help="About how long the whole demo takes.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for the demo's database, snapshots and logs.")] = None,
    json_out: Annotated[Path | None, typer.Option(help="Write the summary here, too.")] = None,
    *,
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Leave everything up until Ctrl-C.")] = False,
    upstream: Annotated[bool, typer.Option("--upstream", help="With users' vectors, and their ranker.")] = False,
) -> None:
    """The whole loop on a real stream: broker, ingest, trainer, two inference workers, a live view, a summary."""
    from ops.demo import run as whole_loop

    raise typer.Exit(
        whole_loop.run(
            keep_running=keep_running, minutes=minutes, data_dir=data_dir, json_out=json_out, has_upstream=upstream
        )
    )


@app.command()
def verify(
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check that every stored interaction is in the newest weights exactly once; exit 1 if not (yet)."""
    import dataclasses

    from feature_store.config import FeatureStoreConfig
    from feature_store.store import FeatureStore
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage
    from ops.verify import take_account

    settings = settings_of(config)
    own = settings.get(HeadraceConfig)
    store = FeatureStore(settings.get(FeatureStoreConfig))
    account = take_account(store, snapshot_storage(settings), own.model)
    store.close()
    print(json.dumps(dataclasses.asdict(account)) if as_json else account.sentence())
    raise typer.Exit(0 if account.is_equal else 1)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"headrace {package_version('headrace')}")


def main() -> None:
    """Entry point: what a person can mend is one sentence on stderr, never a traceback."""
    # Commands speak for themselves; what libraries log is for daemons, which ask for it.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        app()
    except _REFUSALS as error:
        say(f"headrace: {error}")
        sys.exit(2)
    except UnicodeEncodeError as error:
        if error.object not in sys.argv:
            raise
        # Bytes that a shell passes on and that no id, which is UTF-8, can hold.
        say(f"headrace: {error.object!r} is not UTF-8 text")
        sys.exit(2)
    except (StreamError, FeatureStoreError, SnapshotError, OSError) as error:
        # The broker, the database, the snapshots' storage or a disk went away and the command could not wait for it.
        say(f"headrace: {error}")
        sys.exit(1 if _is_daemon() else 2)


def _is_daemon() -> bool:
    """A supervised daemon that lost its broker or database is to be started again: not a refusal."""
    return bool({"ingest", "train", "upstream", "serve"} & set(sys.argv[1:2]))


def _run_workers(settings: Settings, num_workers: int, first_port: int | None, config: Path | None) -> None:
    from ops.supervisor import Supervisor
    from ops.up import UpOptions, workers

    _log_to_stderr(settings)
    options = UpOptions(num_replicas=num_workers, first_port=first_port, config_path=config)
    Supervisor(workers(settings, options), write_line=lambda line: print(line, flush=True)).run()


def _run_daemon(settings: Settings, run: Callable[[Settings], int]) -> None:
    from ops.supervisor import stop_when_orphaned

    # Until the daemon listens itself there is nothing to finish: it unwinds from wherever its start has come to.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    _log_to_stderr(settings)
    stop_when_orphaned(os.environ)
    raise typer.Exit(run(settings))


def _log_to_stderr(settings: Settings) -> None:
    from ops.config import HeadraceConfig
    from ops.log_limits import RepetitionFilter

    level = settings.get(HeadraceConfig).log_level.upper()
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level,
        format="%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    if level == "INFO":
        # What they tell at this level (joins, subscriptions, start of each service) is for their own developers.
        for library in ("aiokafka", "alembic", "faust", "mode", "httpx"):
            logging.getLogger(library).setLevel(logging.WARNING)
    if level != "DEBUG":
        for handler in logging.getLogger().handlers:
            handler.addFilter(RepetitionFilter("aiokafka"))


def _checked(build: Callable[[], Any]) -> Any:
    """Build a config from command-line options; what it refuses is the caller's mistake."""
    try:
        return build()
    except ValueError as error:
        raise OpsError(str(error)) from error
