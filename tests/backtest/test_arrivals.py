"""Delays and wrong clocks are functions of the seed and of the event or its user, and lose nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backtest.arrivals import ArrivalConfig, in_order_of_arrival
from backtest.event_columns import EventColumns
from tests.backtest.conftest import walks


def arrived(config: ArrivalConfig, *, size: int) -> EventColumns:
    def batches() -> Iterator[EventColumns]:
        return map(EventColumns.of, walks(400).batches(size))

    return EventColumns.concat(list(in_order_of_arrival(batches(), config)))


def test_nothing_is_moved_by_default() -> None:
    events = arrived(ArrivalConfig(), size=70)
    assert events.event.tolist() == list(range(400))
    assert np.array_equal(events.arrival_ms, events.event_time_ms)


def test_delays_have_the_mean_that_was_asked_for_and_no_event_is_lost() -> None:
    events = arrived(ArrivalConfig(delay_ms=20_000, delay_max_ms=60_000, seed=1), size=70)
    assert sorted(events.event.tolist()) == list(range(400))
    assert (np.diff(events.arrival_ms) >= 0).all()
    delay_ms = events.arrival_ms - events.event_time_ms
    assert delay_ms.min() >= 0
    assert delay_ms.max() <= 60_000
    # An exponential cut at three times its mean.
    assert delay_ms.mean() == pytest.approx(20_000 * (1 - np.exp(-3)), rel=0.15)


def test_the_order_of_arrival_does_not_depend_on_how_the_log_is_read() -> None:
    config = ArrivalConfig(delay_ms=5_000, clock_skew_ms=3_000, seed=7)
    one, other = arrived(config, size=7), arrived(config, size=400)
    assert one.event.tolist() == other.event.tolist()
    assert one.event_time_ms.tolist() == other.event_time_ms.tolist()
    assert one.event.tolist() != arrived(ArrivalConfig(delay_ms=5_000, seed=8), size=400).event.tolist()


def test_a_wrong_clock_is_wrong_by_the_same_for_all_events_of_a_user() -> None:
    events = arrived(ArrivalConfig(clock_skew_ms=3_000), size=70)
    skew_ms = events.event_time_ms - events.query_time_ms
    per_user = [set(skew_ms[events.user_id == user].tolist()) for user in np.unique(events.user_id)]
    assert all(len(one) == 1 for one in per_user)
    assert 1_000 < np.std([one.pop() for one in per_user]) < 6_000


@pytest.mark.parametrize(
    ("options", "said"), [({"delay_ms": -1}, "delay_ms"), ({"delay_ms": 5, "delay_max_ms": 1}, "at most")]
)
def test_delays_that_cannot_be_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ArrivalConfig(**options)
