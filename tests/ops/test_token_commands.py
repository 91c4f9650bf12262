"""`headrace token new`."""

from __future__ import annotations

import re

from serving.access import token_digest
from serving.access_config import TokenEntry
from tests.ops.command_line import Headrace


def test_a_token_is_printed_once_with_the_entry_that_settings_take(headrace: Headrace) -> None:
    ran = headrace("token", "new", "--name", "shop", "--scope", "write", "--scope", "read")
    assert ran.returncode == 0
    found = re.fullmatch(r"token, shown this once:\s+(hr_\S+)\nentry for access.tokens:\s+\"(\S+)\"\n", ran.stdout)
    assert found is not None, ran.stdout
    entry = TokenEntry.parse(found[2])
    assert (entry.name, entry.scopes) == ("shop", frozenset({"read", "write"}))
    assert entry.digest == token_digest(found[1])
    shown = headrace("config", "show", HEADRACE_ACCESS__TOKENS=found[2])
    assert f'access.tokens = ["{found[2]}"]' in shown.stdout


def test_a_name_that_settings_could_not_hold_is_refused(headrace: Headrace) -> None:
    ran = headrace("token", "new", "--name", "the shop", "--scope", "read")
    assert ran.returncode == 2
    assert "--name 'the shop'" in ran.stderr


def test_a_worker_that_would_be_open_to_others_is_refused_in_one_sentence(headrace: Headrace) -> None:
    ran = headrace("serve", "--port", "0", HEADRACE_SERVING__HOST="0.0.0.0")
    assert ran.returncode == 2
    assert "headrace: serving.host = 0.0.0.0 lets other machines in, and access.tokens is empty" in ran.stderr
