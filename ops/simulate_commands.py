"""`headrace simulate`: the command. It reads options, writes two files and says what to do with them."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ops.command_line import say
from ops.errors import OpsError


class ScenarioName(StrEnum):
    """How a simulated stream changes."""

    STATIONARY = "stationary"
    SUDDEN = "sudden"
    GRADUAL = "gradual"
    RECURRING = "recurring"
    NEW_ITEMS = "new_items"
    DIRICHLET = "dirichlet"
    LONG_RANGE = "long_range"


def simulate(
    file: Annotated[Path, typer.Argument(help="The stream, .parquet; the truth goes beside it, .truth.json.")],
    scenario: Annotated[ScenarioName, typer.Option(help="How the stream changes.")] = ScenarioName.SUDDEN,
    events: Annotated[int, typer.Option(help="Events.")] = 60_000,
    changes: Annotated[int, typer.Option(help="Changes, evenly spread.")] = 1,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 600,
    users: Annotated[int, typer.Option(help="Users who are active at the same time.")] = 400,
    events_per_day: Annotated[float, typer.Option(help="Mean events in a day of event time.")] = 5_000.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same events.")] = 0,
) -> None:
    """Write a stream that changes at known places, for `headrace replay`, and the truth about it."""
    from backtest import simulator

    if file.suffix != ".parquet":
        raise OpsError(f"{file}: a simulated stream is written as .parquet")
    try:
        config = simulator.SimulatorConfig(
            scenario=scenario.value,
            num_events=events,
            num_changes=changes,
            num_items=items,
            num_users=users,
            events_per_day=events_per_day,
            seed=seed,
        )
    except ValueError as error:
        raise OpsError(str(error)) from error
    stream = simulator.simulate(config)
    truth = stream.write(file, config)
    say(f"headrace: wrote {file} and {truth}; to send it:")
    say(f"headrace replay {file} --user-col user_id --item-col item_id --time-col event_time")
    print(json.dumps({"file": str(file), "truth": str(truth), **stream.truth(config)}))
