"""`python -m ops` is `headrace`."""

from __future__ import annotations

from ops.cli import main

main()
