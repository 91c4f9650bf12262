"""A stream in which what comes next depends on what happened a hundred interactions ago.

Items are of three kinds: *openers*, each with one *sequel*, and *fillers*. At each of a user's interactions a kind is
drawn with fixed chances. An opener is any that the user has not had. A sequel is that of an opener taken at least
`delay` interactions ago, not had yet, each as likely as the other; while there is none, and for the rest, a filler
that the user has not had. Nobody takes an item twice, so a sequel that was taken tells nothing about the next: only who
reads back beyond the delay and knows what belongs to what predicts sequels, and nobody predicts the others. Nothing
changes on the way.

Shapes: N events, V items. Of P pairs, opener p is item p and its sequel item P + p; fillers follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backtest.ideal import ideal_scores

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRangeConfig:
    """The same values give the same stream."""

    num_events: int
    num_users: int
    """Users who are active at the same time; who leaves is replaced by someone new."""
    num_pairs: int = 120
    num_fillers: int = 400
    opener_share: float = 0.25
    sequel_share: float = 0.3
    """Above opener_share, so that few sequels wait for their turn."""
    delay: int = 120
    """Interactions between an opener and its sequel at least."""
    interactions_per_user: int = 300
    """After so many a user leaves."""

    def __post_init__(self) -> None:
        for name in ("num_events", "num_users", "num_pairs", "delay", "interactions_per_user"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if min(self.opener_share, self.sequel_share) <= 0 or self.opener_share + self.sequel_share >= 1:
            raise ValueError(
                f"opener_share = {self.opener_share}, sequel_share = {self.sequel_share}: must be above 0, and below 1"
                " together"
            )
        if self.num_fillers <= self.interactions_per_user:
            raise ValueError(
                f"num_fillers = {self.num_fillers}: must be above interactions_per_user ({self.interactions_per_user}),"
                " since nobody takes an item twice"
            )

    @property
    def num_items(self) -> int:
        """V."""
        return 2 * self.num_pairs + self.num_fillers


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRangeStream:
    """user_id, item_id: int64[N]. is_sequel: bool[N].

    ideal_hr_at_10, ideal_ndcg_at_20: float64[N], expected scores of ranking by the true probabilities given the whole
    history, NaN for a user's first event. sequel_hr_at_10: float64[N], chance that such a ranking has the sequel that
    comes next among its first ten, NaN where none comes.
    """

    user_id: Int64s
    item_id: Int64s
    is_sequel: NDArray[np.bool_]
    ideal_hr_at_10: Float64s
    ideal_ndcg_at_20: Float64s
    sequel_hr_at_10: Float64s


class _User:
    """What one user has had, and what is left."""

    def __init__(self, user_id: int, config: LongRangeConfig) -> None:
        self.user_id, self._config, self.num_taken = user_id, config, 0
        self._openers = list(range(config.num_pairs))
        self._fillers = list(range(2 * config.num_pairs, config.num_items))
        self._opened: list[tuple[int, int]] = []

    def sequels(self) -> list[int]:
        """Those whose turn has come."""
        return [item for item, since in self._opened if self.num_taken - since >= self._config.delay]

    def probability(self) -> Float64s:
        """[V] of the next item."""
        probability_V, sequels = np.zeros(self._config.num_items), self.sequels()
        opener_share = self._config.opener_share if self._openers else 0.0
        sequel_share = self._config.sequel_share if sequels else 0.0
        probability_V[self._openers] = opener_share / max(len(self._openers), 1)
        probability_V[sequels] = sequel_share / max(len(sequels), 1)
        probability_V[self._fillers] = (1 - opener_share - sequel_share) / len(self._fillers)
        return probability_V

    def take(self, item: int) -> None:
        """One interaction is over."""
        num_pairs = self._config.num_pairs
        if item < num_pairs:
            self._openers.remove(item)
            self._opened.append((num_pairs + item, self.num_taken))
        elif item < 2 * num_pairs:
            self._opened = [(other, since) for other, since in self._opened if other != item]
        else:
            self._fillers.remove(item)
        self.num_taken += 1


def long_range_stream(config: LongRangeConfig, rng: np.random.Generator) -> LongRangeStream:
    """The stream of a configuration and a generator's state."""
    N = config.num_events
    users = [_User(number, config) for number in range(config.num_users)]
    next_user = config.num_users
    user_id, item_id = np.empty(N, np.int64), np.empty(N, np.int64)
    hr, ndcg, sequel_hr = np.full(N, np.nan), np.full(N, np.nan), np.full(N, np.nan)
    for index in range(N):
        at = int(rng.integers(len(users)))
        user = users[at]
        probability_V = user.probability()
        bound_V = probability_V.cumsum()
        item = int(np.searchsorted(bound_V, rng.random() * bound_V[-1], side="right"))
        user_id[index], item_id[index] = user.user_id, item
        if user.num_taken:
            hr[index], ndcg[index] = ideal_scores(probability_V)
        if config.num_pairs <= item < 2 * config.num_pairs:
            sequel_hr[index] = _share_of_first_ten(probability_V, user.sequels())
        user.take(item)
        if user.num_taken == config.interactions_per_user:
            users[at] = _User(next_user, config)
            next_user += 1
    return LongRangeStream(
        user_id=user_id,
        item_id=item_id,
        is_sequel=(item_id >= config.num_pairs) & (item_id < 2 * config.num_pairs),
        ideal_hr_at_10=hr,
        ideal_ndcg_at_20=ndcg,
        sequel_hr_at_10=sequel_hr,
    )


def _share_of_first_ten(probability_V: Float64s, sequels: list[int]) -> float:
    """Of sequels that are equally likely: how many the ten places have room for."""
    likelier = int((probability_V > probability_V[sequels[0]]).sum())
    return min(max(10 - likelier, 0), len(sequels)) / len(sequels)
