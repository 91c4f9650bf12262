"""What can go wrong in `stream`.

StreamError
├── LogUnavailableError       the broker cannot be reached; retry with back-off
│   └── RecordTooLargeError   it takes no record of that size; a retry helps once a limit is raised
├── LogResetError             the log ends before, or starts after, the stored position: events were lost upstream
└── MessageFormatError        a headrace message on a topic cannot be decoded
"""

from __future__ import annotations


class StreamError(Exception):
    """Root of this room's errors."""


class LogUnavailableError(StreamError):
    """The broker cannot be reached or does not answer."""


class RecordTooLargeError(LogUnavailableError):
    """A record is larger than the broker, or `log.max_message_bytes`, allows."""


class LogResetError(StreamError):
    """The log no longer holds the records that the stored position points at; of `partition`, where that is known."""

    def __init__(self, message: str, partition: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.partition = partition


class MessageFormatError(StreamError):
    """A message written by headrace cannot be decoded by this version."""
