"""`headrace trainer`: what the trainer has set aside."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ops.command_line import ConfigOption, settings_of
from ops.errors import OpsError

trainer_app = typer.Typer(help="What the trainer has set aside.", no_args_is_help=True)


@trainer_app.command("inspect")
def trainer_inspect(
    step: Annotated[int | None, typer.Argument(help="Step whose interactions to show; none: list all.")] = None,
    config: ConfigOption = None,
    *,
    ranking: Annotated[bool, typer.Option("--ranking", help="STEP is one of the ranking head's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List the batches that were not learned from and why, or show the interactions of one."""
    from polars.exceptions import PolarsError

    from online_trainer.quarantine import list_set_aside, read_interactions
    from ops.config import HeadraceConfig
    from ops.set_aside_report import interactions_text, list_text

    own = settings_of(config).get(HeadraceConfig)
    root = own.quarantine_dir
    kept = list_set_aside(root)
    if step is None:
        print(json.dumps([asdict(why) for why in kept], indent=2) if as_json else list_text(kept))
        return
    why = next((why for why in kept if (why.step, why.is_of_ranking) == (step, ranking)), None)
    if why is None:
        raise OpsError(f"no batch of step {step} is kept in {root}: `headrace trainer inspect` lists those that are")
    try:
        rows = read_interactions(root, why)
    except (OSError, PolarsError) as error:
        raise OpsError(f"the interactions of step {step} in {root} cannot be read: {error}") from error
    if as_json:
        print(json.dumps(asdict(why) | {"interactions": rows.fill_nan(None).to_dicts()}))
    else:
        print(interactions_text(why, rows))
