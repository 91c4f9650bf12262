"""Counting different values in bounded memory."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from backtest import distinct
from backtest.distinct import DistinctCount


def test_few_are_counted_exactly_however_they_come() -> None:
    count = DistinctCount()
    for part in ([1, 2, 2], [], [2, 3], [1]):
        count.add(pl.Series(part, dtype=pl.Int64))
    assert (count.count, count.is_exact) == (3, True)
    texts = DistinctCount()
    texts.add(pl.Series(["a", "b", "a"]))
    assert texts.count == 2


@pytest.mark.parametrize("stride", [1, 2**32])
def test_many_are_estimated_closely_in_bounded_memory(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "KEPT_MAX", 4_096)  # one standard deviation: 1.6 %
    count = DistinctCount()
    for start in range(0, 300_000, 20_000):
        # Each part repeats half of the one before.
        count.add(pl.Series(stride * np.arange(max(0, start - 10_000), start + 20_000)))
        assert len(count._smallest) <= 4_096
    assert not count.is_exact
    assert count.count == pytest.approx(300_000, rel=0.08)
