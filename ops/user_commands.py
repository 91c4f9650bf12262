"""`headrace user`: the commands. They read options and print."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import asyncio
from typing import Annotated

import typer

from ops.command_line import ConfigOption, open_store, say, settings_of
from ops.errors import OpsError

user_app = typer.Typer(help="One user: show what is stored, or have it forgotten.", no_args_is_help=True)

UserArgument = Annotated[str, typer.Argument(metavar="ID", help="A number, or the text that producers use.")]


@user_app.command("show")
def user_show(
    user_id: UserArgument,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many interactions.")] = 20,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print a user's history in event order; exit 1 if there is none."""
    from ops.user_history import show_user
    from stream.events import EventRules

    settings = settings_of(config)
    with open_store(settings) as store:
        shown = show_user(store, user_id, settings.get(EventRules), limit=limit)
    if shown is None:
        say(f"headrace: user {user_id!r} has no history")
        raise typer.Exit(1)
    print(shown.to_json() if as_json else shown.to_text())


@user_app.command("forget")
def user_forget(
    user_id: UserArgument,
    config: ConfigOption = None,
    *,
    text: Annotated[bool, typer.Option("--text", help="ID is a text, although it looks like a number.")] = False,
) -> None:
    """Send the command to remove everything about a user; ingest carries it out."""
    from ops.sending import send_command
    from stream.kafka import KafkaConfig, KafkaLog
    from stream.messages import ForgetUser, id_as_written

    try:
        command = ForgetUser(user_id=id_as_written(user_id, as_text=text))
    except ValueError as error:
        raise OpsError(str(error)) from error
    asyncio.run(send_command(KafkaLog(settings_of(config).get(KafkaConfig)), command))
    kind = "number" if isinstance(command.user_id, int) else "text"
    print(f"sent: forget the user with the {kind} {user_id!r}; `headrace user show` tells when it is done")
