from __future__ import annotations

import pytest

from ops.demo.state import GrowingCount, Rate


def test_a_rate_is_that_of_the_newest_seconds_and_survives_a_restart_of_the_count() -> None:
    rate = Rate(window_s=5.0)
    assert rate.add(0.0, 0) == 0.0
    for second in range(1, 11):
        latest = rate.add(float(second), second * 100 if second <= 5 else 500 + (second - 5) * 10)
    assert latest == pytest.approx(10.0)
    assert rate.add(11.0, 3) == 0.0


def test_a_count_that_begins_again_goes_on_growing() -> None:
    count = GrowingCount()
    assert [count.of(seen) for seen in (0, 10, 25, 3, 8, 0, 1)] == [0, 10, 25, 28, 33, 33, 34]
