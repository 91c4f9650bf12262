"""Merging equals sorting a set, for any stored and new rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.merging import Places, merge

NUM_GROUPS = 4
PLACES = st.tuples(st.integers(0, NUM_GROUPS - 1), st.integers(0, 9), st.sampled_from([0, 1, 2**63, 2**64 - 1]))


def places(rows: list[tuple[int, int, int]]) -> Places:
    groups, times, keys = zip(*rows, strict=True) if rows else ((), (), ())
    return Places(
        group=np.array(groups, np.int64), event_time_ms=np.array(times, np.int64), event_key=np.array(keys, np.uint64)
    )


@given(st.sets(PLACES, max_size=30), st.lists(PLACES, max_size=20))
def test_merging_equals_sorting_the_union(stored: set[tuple[int, int, int]], new: list[tuple[int, int, int]]) -> None:
    rows = sorted(stored) + new
    merged = merge(places(sorted(stored)), places(new), NUM_GROUPS)
    union = sorted(stored | set(new))
    assert [rows[row] for row in merged.source] == union
    for group in range(NUM_GROUPS):
        expected = [row for row in union if row[0] == group]
        changed = [number for number, row in enumerate(expected) if row not in stored]
        low, high = merged.offsets[group], merged.offsets[group + 1]
        assert [rows[row] for row in merged.source[low:high]] == expected
        assert merged.first_changed[group] == (changed[0] if changed else len(expected))


@given(st.sets(PLACES, max_size=30), st.lists(PLACES, max_size=20))
def test_the_first_of_equal_rows_is_accepted(
    stored: set[tuple[int, int, int]], new: list[tuple[int, int, int]]
) -> None:
    merged = merge(places(sorted(stored)), places(new), NUM_GROUPS)
    accepted = [row not in stored and row not in new[:number] for number, row in enumerate(new)]
    late = [
        is_new and any(row < other for other in stored if other[0] == row[0])
        for is_new, row in zip(accepted, new, strict=True)
    ]
    assert merged.accepted.tolist() == accepted
    assert merged.late.tolist() == late
