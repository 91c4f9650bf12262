"""The benchmark of recomputation, on a short row."""

from __future__ import annotations

import pytest

from benchmarks.bench_recompute import TARGETS, measure


@pytest.mark.parametrize("attention", ["full", "semi-local"])
def test_both_arms_run_and_what_they_keep_is_counted(attention: str) -> None:
    row = measure(128, 80, attention, steps=1)
    assert row["kept_saved"] > TARGETS["kept_saved"]
    assert all(seconds > 0 for seconds in row["cpu_s"])
