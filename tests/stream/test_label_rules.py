"""The rules of the label join: settings, and the index of who has impressions and when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.ids import stable_id
from feature_store.impressions import OpenImpression, UserWindows
from stream.errors import MessageFormatError
from stream.label_rules import LabelConfig, forgotten_by_tombstone
from stream.log import Record
from stream.window_index import WindowIndex

CONFIG = LabelConfig(window_ms=10, allowed_lateness_ms=5, correction_ms=20)
Window = tuple[int, int, int]
"""(user, from, until)"""

windows = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 3, 2**63 - 1]), st.integers(0, 30), st.integers(1, 15)), max_size=12
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_ms", 0),
        ("allowed_lateness_ms", -1),
        ("correction_ms", 10**12),
        ("history_len", 0),
        ("user_impressions_max", 0),
        ("indexed_users_max", -1),
        ("poll_records", 0),
        ("batch_wait_ms", -1),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^labels\.{name} = {value}: must lie in \d+\.\.\d+$"):
        LabelConfig(**{name: value})  # type: ignore[arg-type]


def impression(window: Window) -> OpenImpression:
    user_id, from_ms, length_ms = window
    none: Any = np.empty(0, np.int64)
    return OpenImpression(
        user_id=user_id,
        request_id="r",
        from_ms=from_ms,
        until_ms=from_ms + length_ms,
        due_ms=0,
        item_ids=none,
        is_taken=none.astype(np.bool_),
        payload=b"",
    )


def may_take(index: WindowIndex, user_id: int, time_ms: int) -> bool:
    return bool(index.may_take(np.array([user_id]), np.array([time_ms]))[0])


@given(stored=windows, added=st.lists(windows, max_size=3), limit=st.integers(0, 6))
def test_the_index_never_says_no_to_what_lies_in_a_window(
    stored: list[Window], added: list[list[Window]], limit: int
) -> None:
    loaded = {
        user: (min(f for u, f, _ in stored if u == user), max(f + n for u, f, n in stored if u == user))
        for user in sorted({user for user, _, _ in stored})
    }
    columns = np.array([(user, *window) for user, window in loaded.items()], np.int64).reshape(-1, 3).T
    index = WindowIndex(UserWindows(user_id=columns[0], from_ms=columns[1], until_ms=columns[2]), limit)
    for batch in added:
        index.add([impression(window) for window in batch])
    everything = [*stored, *(window for batch in added for window in batch)]
    users = {user for user, _, _ in everything}
    assert index.is_whole == (len(users) <= limit)
    for user in (0, 1, 2, 3, 4, 2**63 - 1):
        mine = [(from_ms, from_ms + length) for known, from_ms, length in everything if known == user]
        for time_ms in range(-1, 50):
            expected = not index.is_whole or any(
                min(f for f, _ in mine) <= time_ms < max(u for _, u in mine) for _ in mine[:1]
            )
            assert may_take(index, user, time_ms) == expected, (user, time_ms)


def test_users_leave_the_index_when_their_last_impression_is_removed() -> None:
    index = WindowIndex.empty(10)
    index.add([impression((1, 1_000_000, 10)), impression((2, 1_000_000, 10)), impression((2, 1_000_500, 10))])
    removal_ms = CONFIG.removal_ms(1_000_010)
    index.drop_ended(removal_ms - 1, CONFIG)
    assert may_take(index, 1, 1_000_000)
    index.drop_ended(removal_ms, CONFIG)
    assert may_take(index, 1, 1_000_000), "looked at again a moment after the last time"
    index.drop_ended(removal_ms + 60_000, CONFIG)
    assert not may_take(index, 1, 1_000_000)
    index.add([impression((2, 1_200_000, 10))])
    index.drop_ended(removal_ms + 120_000, CONFIG)
    assert may_take(index, 2, 1_200_000)


def test_the_limit_holds_for_what_is_added() -> None:
    index = WindowIndex.empty(2)
    index.add([impression((1, 0, 10)), impression((2, 0, 10))])
    assert not may_take(index, 3, 5)
    index.add([impression((3, 0, 10))])
    assert may_take(index, 4, 10**9)


@pytest.mark.parametrize(
    ("key", "user_id"),
    [
        (b"17", 17),
        (b"anna", stable_id("anna")),
        (b"9" * 19, stable_id("9" * 19)),
        (b"9" * 5_000, stable_id("9" * 5_000)),
        ("²".encode(), stable_id("²")),
    ],
)
def test_a_tombstone_names_its_user_by_the_key(key: bytes, user_id: int) -> None:
    assert forgotten_by_tombstone(Record("impressions", 0, 0, 0, key, None, ())) == user_id


def test_a_tombstone_without_a_key_is_refused() -> None:
    with pytest.raises(MessageFormatError, match="needs the user id as key"):
        forgotten_by_tombstone(Record("impressions", 0, 0, 0, None, None, ()))
