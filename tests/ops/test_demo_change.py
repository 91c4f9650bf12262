from __future__ import annotations

import pytest

from backtest.datasets import Title
from ops.demo_change import ListDiff, Seen, Taste, choose_taste, choose_user, diff, first_s, new_events


def test_the_difference_of_two_lists_keeps_their_orders() -> None:
    assert diff([1, 2, 3, 4], [4, 9, 1, 8]) == ListDiff(entered=(9, 8), left=(2, 3))
    assert diff([1, 2], [2, 1]) == ListDiff(entered=(), left=())


def test_the_user_is_the_newest_one_with_a_decent_history() -> None:
    few, decent, later, too_many = 1, 2, 3, 4
    user_ids = [decent] * 30 + [later] * 25 + [too_many] * 100 + [few] * 3
    assert choose_user(user_ids) == later
    assert choose_user([few, few, decent]) == few


def _catalogue() -> tuple[dict[int, Title], list[int]]:
    """Films 100 to 119 are animation, 200 to 219 horror; each was rated 20 times, the lower numbers more often."""
    titles = {number: Title(title=f"film {number}", genres=("Animation",)) for number in range(100, 120)}
    titles |= {number: Title(title=f"film {number}", genres=("Horror",)) for number in range(200, 220)}
    rated = [number for number in titles for _ in range(20 + (220 - number))]
    return titles, rated


def test_the_new_taste_is_a_genre_the_user_does_not_know_and_films_nobody_has_shown_him() -> None:
    titles, rated = _catalogue()
    taste = choose_taste(rated, titles, seen={200, 201}, shown=[202, 203])
    assert taste == Taste("Animation", (100, 101, 102, 103, 104))
    taste = choose_taste(rated, titles, seen={100, 101}, shown=[102, 103])
    assert taste == Taste("Horror", (200, 201, 202, 203, 204))


def test_without_genres_the_most_popular_unseen_films_are_taken() -> None:
    _, rated = _catalogue()
    assert choose_taste(rated, {}, seen={100}, shown=[101]) == Taste("popular", (102, 103, 104, 105, 106))


def test_new_events_come_after_the_stream_each_with_an_identity_of_its_own() -> None:
    events = new_events(7, Taste("Horror", (1, 2, 3)), after_ms=1_000, prefix="demo")
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
