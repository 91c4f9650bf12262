from __future__ import annotations

import pytest

from backtest.datasets import Title
from ops.demo.change import ListDiff, Seen, choose_films, choose_user, diff, first_s, new_events, num_classics


def test_the_difference_of_two_lists_keeps_their_orders() -> None:
    assert diff([1, 2, 3, 4], [4, 9, 1, 8]) == ListDiff(entered=(9, 8), left=(2, 3))
    assert diff([1, 2], [2, 1]) == ListDiff(entered=(), left=())


def _catalogue() -> dict[int, Title]:
    """Films 0 to 19 are from 1980 on, films 100 to 119 from 2005 on; 200 has no year."""
    titles = {number: Title(title=f"film {number} ({1980 + number})", genres=()) for number in range(20)}
    titles |= {100 + number: Title(title=f"2001 {number} ({2005 + number})", genres=()) for number in range(20)}
    return titles | {200: Title(title="no year", genres=())}


def test_a_classic_is_known_by_the_year_at_the_end_of_its_title() -> None:
    assert num_classics(_catalogue(), [0, 19, 100, 119, 200, 999]) == 2


def test_the_user_is_the_newest_one_with_a_decent_history_of_new_films() -> None:
    few, classical, modern, older_modern, too_many = 1, 2, 3, 4, 5
    rated = [(older_modern, 100)] * 30 + [(modern, 101)] * 25 + [(classical, 3)] * 30 + [(too_many, 100)] * 100
    rated += [(few, 100)] * 3
    users, items = zip(*rated, strict=True)
    assert choose_user(users, items, _catalogue()) == modern
    assert choose_user([few, few, classical], [100, 101, 3], _catalogue()) == few


def test_the_films_are_the_most_rated_classics_that_the_user_does_not_know() -> None:
    rated = [number for number in _catalogue() for _ in range(300 - number)]
    assert choose_films(rated, _catalogue(), known={0, 2}) == (1, 3, 4, 5, 6)
    assert choose_films(rated, {}, known={0, 2}) == (1, 3, 4, 5, 6)
    assert choose_films([200, 200, 100, 1], _catalogue(), known=set()) == (200, 100, 1)


def test_new_events_come_after_the_stream_each_with_an_identity_of_its_own() -> None:
    events = new_events(7, (1, 2, 3), after_ms=1_000, prefix="demo")
    assert [event.item_id for event in events] == [1, 2, 3]
    assert [event.event_time_ms() for event in events] == [61_000, 121_000, 181_000]
    assert len({event.event_id for event in events}) == 3


@pytest.mark.parametrize(("url", "expected"), [("a", 0.5), ("b", None)])
def test_the_first_answer_with_a_property_is_found_per_worker(url: str, expected: float | None) -> None:
    answers = [
        Seen(url=worker, after_s=after_s, version=version, history_event_time=None)
        for worker, after_s, version in (("a", 0.1, 4), ("b", 0.2, 4), ("a", 0.5, 5), ("a", 0.9, 6))
    ]
    assert first_s(answers, url, lambda one: (one.version or 0) >= 5) == expected
