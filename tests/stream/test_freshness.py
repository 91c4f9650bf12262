"""Ages as mergeable histograms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from stream.freshness import AgeHistogram, AgePair, FreshnessRecorder, RecentAges

ages_lists = st.lists(st.integers(min_value=1, max_value=10**10), min_size=1, max_size=200)


def histogram_of(ages_ms: list[int]) -> AgeHistogram:
    histogram = AgeHistogram()
    histogram.add(np.array(ages_ms, np.int64))
    return histogram


@given(ages_lists, st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_quantiles_are_within_the_bucket_width(ages_ms: list[int], q: float) -> None:
    exact = float(np.quantile(ages_ms, q, method="inverted_cdf"))
    assert histogram_of(ages_ms).quantile_ms(q) == pytest.approx(exact, rel=0.1)


@given(ages_lists, ages_lists)
def test_merging_equals_adding_everything_to_one(left: list[int], right: list[int]) -> None:
    merged = histogram_of(left)
    merged.merge(histogram_of(right))
    assert merged.to_dict() == histogram_of(left + right).to_dict()


@given(ages_lists)
def test_the_stored_form_reads_back_after_json(ages_ms: list[int]) -> None:
    histogram = histogram_of(ages_ms)
    again = AgeHistogram.from_dict(json.loads(json.dumps(histogram.to_dict())))
    assert again.to_dict() == histogram.to_dict()


def test_negative_ages_are_clamped_and_counted() -> None:
    histogram = histogram_of([-5_000, -1, 100])
    assert histogram.num_negative == 2
    assert histogram.count == 3
    assert histogram.quantile_ms(0.5) == 0.5


def test_shifting_moves_every_age() -> None:
    later = histogram_of([100, 200, 400]).shifted(1_000)
    assert later.count == 3
    assert later.quantile_ms(1.0) == pytest.approx(1_400, rel=0.1)


def test_an_empty_histogram_has_no_quantiles() -> None:
    assert AgeHistogram().quantile_ms(0.99) is None


def test_a_foreign_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="not an age histogram"):
        AgeHistogram.from_dict({"bins": []})


def test_a_recorder_measures_from_event_and_from_append() -> None:
    recorder = FreshnessRecorder("F1", mode="live")
    recorder.record(np.array([1_000, 2_000]), np.array([2_900, 2_950]), now_ms=3_000, span=trace.INVALID_SPAN)
    assert recorder.total.event.quantile_ms(1.0) == pytest.approx(2_000, rel=0.1)
    assert recorder.total.append.quantile_ms(1.0) == pytest.approx(100, rel=0.1)


def test_what_is_recent_is_forgotten_and_the_total_stays() -> None:
    recorder = FreshnessRecorder("F1", mode="live")
    for now_ms, age_ms in ((1_000_000, 50), (1_200_000, -4), (1_400_000, 900)):
        recorder.record(
            np.array([now_ms - age_ms]), np.array([now_ms - age_ms]), now_ms=now_ms, span=trace.INVALID_SPAN
        )

    def recent(now_ms: int) -> AgePair:
        return AgePair.of_dict(json.loads(json.dumps(recorder.summary(now_ms)))["recent"])

    assert (recent(1_400_000).append.count, recent(1_400_000).append.num_negative) == (2, 1)
    assert recent(1_600_000).append.quantile_ms(1.0) == pytest.approx(900, rel=0.1)
    assert recent(9_000_000).event.count == 0
    assert recorder.summary(9_000_000)["append"] == recorder.total.append.summary()
    assert recorder.total.append.count == 3


def test_recent_ages_are_bounded_and_a_clock_set_back_loses_nothing() -> None:
    recent, one = RecentAges(recent_ms=3_000), AgePair()
    one.event.add(np.array([5]))
    for now_ms in [*range(0, 60_000, 50), 10_000]:
        recent.add(one, now_ms)
    assert recent.as_of(60_000).event.count == pytest.approx(3_000 / 50, abs=4)
    assert len(recent._slots) <= 32


def test_counts_below_powers_of_two_are_exact() -> None:
    ages = [0, 1, 2, 3, 4, 1_000, 1_023, 1_024, 1_025, 2**20 - 1, 2**20]
    counts = dict(histogram_of(ages).counts_up_to(range(22)))
    assert counts == {limit: sum(age < limit for age in ages) for limit in counts}
