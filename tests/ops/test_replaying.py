"""What a replay tells a person while it runs."""

from __future__ import annotations

import pytest

from backtest.replay import ReplayProgress
from ops.replaying import progress_line


@pytest.mark.parametrize(
    ("event_time_ms", "words"), [(0, "event time 1970-01-01T00:00:00.000Z"), (2**62, f"event time {2**62} ms")]
)
def test_progress_is_told_whatever_times_a_file_holds(event_time_ms: int, words: str) -> None:
    line = progress_line(ReplayProgress(num_sent=1, num_events=4, events_per_s=2.0, event_time_ms=event_time_ms))
    assert line == f"replay: 1 of 4 events (25%), 2 events/s, {words}"
