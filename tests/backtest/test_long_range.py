"""A long-range stream: sequels follow their openers from far back, and nobody ranks better than by the truth."""

from __future__ import annotations

import numpy as np
import pytest

from backtest.long_range import LongRangeConfig, long_range_stream

CONFIG = LongRangeConfig(
    num_events=8_000, num_users=8, num_pairs=40, num_fillers=130, delay=40, interactions_per_user=100
)


def test_a_sequel_follows_its_opener_once_and_never_before_the_delay() -> None:
    stream = long_range_stream(CONFIG, np.random.default_rng(0))
    distances = []
    for user in np.unique(stream.user_id):
        items = stream.item_id[stream.user_id == user]
        assert len(np.unique(items)) == len(items)
        place = {int(item): at for at, item in enumerate(items)}
        distances += [at - place[item - 40] for item, at in place.items() if 40 <= item < 80]
    assert min(distances) == CONFIG.delay
    assert np.mean(distances) < 1.5 * CONFIG.delay


def test_sequels_are_known_to_the_ideal_and_to_nobody_who_does_not_look_back() -> None:
    """By popularity among what the user has not had: what a window that sees no opener can do."""
    stream = long_range_stream(CONFIG, np.random.default_rng(2))
    counts, seen = np.zeros(CONFIG.num_items), np.zeros((int(stream.user_id.max()) + 1, CONFIG.num_items), bool)
    hits = np.zeros(CONFIG.num_events, bool)
    for at, (user, item) in enumerate(zip(stream.user_id, stream.item_id, strict=True)):
        hits[at] = item in np.argsort(-np.where(seen[user], -1, counts), kind="stable")[:10]
        counts[item] += 1
        seen[user, item] = True
    late = stream.is_sequel & (np.arange(CONFIG.num_events) > 4_000)
    assert stream.sequel_hr_at_10[late].mean() > 0.95
    assert hits[late].mean() < 0.4
    fair = ~np.isnan(stream.ideal_hr_at_10)
    assert hits[fair].mean() < stream.ideal_hr_at_10[fair].mean()


def test_the_ideal_expects_what_is_drawn() -> None:
    stream = long_range_stream(CONFIG, np.random.default_rng(3))
    fair = ~np.isnan(stream.ideal_hr_at_10)
    # Openers and fillers are drawn alike, so a ranking by the truth hits as often as its ten most likely come.
    expected, of_sequels = stream.ideal_hr_at_10[fair], stream.sequel_hr_at_10[fair & stream.is_sequel]
    assert of_sequels.sum() / len(expected) < expected.mean()


@pytest.mark.parametrize("bad", [{"delay": 0}, {"opener_share": 0.8}, {"num_fillers": 300}, {"num_users": 0}])
def test_impossible_settings_are_refused_by_name(bad: dict[str, float]) -> None:
    fields = {"num_events": 10, "num_users": 1, **bad}
    with pytest.raises(ValueError, match=next(iter(bad))):
        LongRangeConfig(**fields)  # type: ignore[arg-type]
