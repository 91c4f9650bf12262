"""What can go wrong with recorded streams.

BacktestError
├── RecordedStreamError     a file cannot be replayed: unreadable, a column is missing or holds what it must not
│   └── RefusedRowsError    rows of it were refused, and that means to stop
├── DatasetMissingError     a data set that ships with headrace is not where it should be
└── RunFolderError          a run's folder cannot be read, or cannot be continued
"""

from __future__ import annotations


class BacktestError(Exception):
    """Root of the errors of this room."""


class RecordedStreamError(BacktestError):
    """The recorded file cannot be replayed; the message names file, column, row and remedy."""


class RefusedRowsError(RecordedStreamError):
    """Rows were refused; the message shows the first of each reason."""


class DatasetMissingError(BacktestError):
    """A data set that ships with headrace is incomplete; the message names the file."""


class RunFolderError(BacktestError):
    """A run's folder cannot be read or continued; the message names it and the remedy."""
