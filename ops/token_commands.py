"""`headrace token`: making bearer tokens. It prints."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

from enum import StrEnum
from typing import Annotated

import typer

from ops.errors import OpsError

token_app = typer.Typer(help="Bearer tokens for the API of inference workers.", no_args_is_help=True)


class ScopeOption(StrEnum):
    """What a token allows."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@token_app.command("new")
def token_new(
    scope: Annotated[list[ScopeOption], typer.Option("--scope", help="What it allows; may be given several times.")],
    name: Annotated[str, typer.Option("--name", help="Who gets it; logs say so.")],
) -> None:
    """Make a token: prints it once, and the entry for access.tokens, which does not reveal it."""
    from serving.access import new_token

    try:
        token, entry = new_token(name, frozenset(one.value for one in scope))
    except ValueError as error:
        raise OpsError(f"--name {name!r}: use 1 to 64 letters, digits, '.', '-' and '_'") from error
    print(f"token, shown this once:       {token}")
    print(f'entry for access.tokens:      "{entry}"')
