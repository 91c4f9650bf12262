"""`headrace store`: what is in the store, whether it is whole, and removing what has expired."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ops.command_line import ConfigOption, open_store, settings_of

if TYPE_CHECKING:
    from feature_store.records import Finding

store_app = typer.Typer(help="How much is stored, whether it is whole, and what has expired.", no_args_is_help=True)


@store_app.command("stats")
def store_stats(
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Count users, interactions, chunks and bytes, and print the position in each log."""
    import dataclasses

    from ops.store_report import stats_text

    with open_store(settings_of(config)) as store:
        stats = store.stats()
    print(json.dumps(dataclasses.asdict(stats), indent=2) if as_json else stats_text(stats))


@store_app.command("verify")
def store_verify(config: ConfigOption = None) -> None:
    """Look at every stored history and position; print what is wrong and where, and exit 1 if anything is."""
    from ops.store_report import verified_sentence

    num_findings = 0

    def print_finding(finding: "Finding") -> None:
        nonlocal num_findings
        num_findings += 1
        print(finding.sentence())

    with open_store(settings_of(config)) as store:
        totals = store.verify(print_finding)
    print(verified_sentence(totals, num_findings))
    raise typer.Exit(1 if num_findings else 0)


@store_app.command("prune")
def store_prune(config: ConfigOption = None) -> None:
    """Remove what store.max_history and store.max_age_ms let expire, beside running daemons."""
    from ops.store_report import pruned_sentence

    num_chunks, num_interactions, after_user = 0, 0, -1
    with open_store(settings_of(config)) as store:
        while True:
            pruned = store.prune(after_user=after_user)
            num_chunks += pruned.num_chunks
            num_interactions += pruned.num_interactions
            if pruned.next_after is None:
                break
            after_user = pruned.next_after
        print(pruned_sentence(store.retention, num_chunks, num_interactions))
