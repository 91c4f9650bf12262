"""The command line in this process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from ops.cli import main
from tests.ops.command_line import Headrace, Ran


@pytest.fixture
def headrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Headrace:
    """Runs a command in this process (a new one costs seconds), in a folder of its own and without our settings."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)

    root = logging.getLogger()

    def run(*arguments: str, **environment: str) -> Ran:
        handlers, level = root.handlers[:], root.level
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["headrace", *arguments])
            for name, value in environment.items():
                patched.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main()
        # A daemon's log goes to a stderr that is gone after the test; other things of this process still log.
        root.handlers[:] = handlers
        root.setLevel(level)
        captured = capsys.readouterr()
        return Ran(left.value.code if isinstance(left.value.code, int) else 0, captured.out, captured.err)

    return run
