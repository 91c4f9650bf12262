"""A stream of ratings in which a long history tells what a short one cannot, and a part of it is a day old too late.

``rating = what the item is worth + what the user's mood is + noise``. A mood is a part of the user that stays, and one
that drifts (an Ornstein-Uhlenbeck process). A user comes in visits of several pages; a page shows a few items drawn at
random, and the user rates all of them. One rating says little, so the part that stays takes hundreds of ratings to
know, while the part that drifts is known from the latest alone.

All of it is Gaussian, so what any part of a history says of the next rating is known exactly (``forecast``): the best
that anybody can do who reads so many ratings, or not the newest. Nothing else changes on the way.

Shapes: N ratings, V items, H ratings of a history, P pages of a user.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]
_HOUR_MS = 3_600_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MoodConfig:
    """The same values give the same stream."""

    num_users: int
    ratings_per_user: int = 400
    num_users_at_once: int = 60
    """Users who are active at the same time."""
    num_items: int = 300
    item_variance: float = 0.5
    """Of a rating: what everybody says alike about an item."""
    stable_variance: float = 1.5
    """... what the part of a user that stays says."""
    drifting_variance: float = 1.0
    """... what the part that drifts says."""
    noise_variance: float = 10.0
    drift_h: float = 18.0
    """Hours in which the covariance of the drifting part with what it was falls to 1/e."""
    page_items: int = 8
    pages_per_visit: float = 2.0
    """Mean (geometric)."""
    minutes_between_pages: float = 15.0
    """Mean (exponential), within a visit."""
    hours_between_visits: float = 4.0
    """Mean (exponential)."""
    start_ms: int = 1_700_000_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_users", "ratings_per_user", "num_users_at_once", "num_items", "page_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("item_variance", "stable_variance", "drifting_variance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be 0 or more")
        for name in ("noise_variance", "drift_h", "minutes_between_pages", "hours_between_visits"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        if not self.pages_per_visit >= 1:
            raise ValueError(f"pages_per_visit = {self.pages_per_visit}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoodStream:
    """N ratings in order of time, those of a page together.

    user_id, item_id: int64[N]. page: int64[N], ascending; a page is of one user. time_ms: int64[N], the same for all of
    a page. value: float64[N], around 0. worth_V: float64[V], what everybody says about an item.
    """

    user_id: Int64s
    item_id: Int64s
    page: Int64s
    time_ms: Int64s
    value: Float64s
    worth_V: Float64s


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a rating less what its item is worth: mean and variance, noise included."""

    mean: float
    variance: float


def mood_stream(config: MoodConfig) -> MoodStream:
    """The stream of a configuration. Users begin one after the other, as one leaves."""
    rng = np.random.default_rng(config.seed)
    worth_V = rng.normal(scale=config.item_variance**0.5, size=config.num_items)
    num_pages = -(-config.ratings_per_user // config.page_items)
    starts_h, items, values = [], [], []
    for user in range(config.num_users):
        time_h = _page_times_h(config, num_pages, rng)
        mood_P = _moods(config, time_h, rng)
        item_PC = rng.integers(0, config.num_items, (num_pages, config.page_items))
        noise_PC = rng.normal(scale=config.noise_variance**0.5, size=item_PC.shape)
        starts_h.append(user / config.num_users_at_once * time_h[-1] + time_h)
        items.append(item_PC)
        values.append(worth_V[item_PC] + mood_P[:, None] + noise_PC)
    start_h = np.concatenate(starts_h)
    order, each = np.argsort(start_h, kind="stable"), config.page_items
    time_ms = config.start_ms + (start_h[order] * _HOUR_MS).astype(np.int64)
    return MoodStream(
        user_id=np.repeat(order // num_pages, each),
        item_id=np.concatenate(items)[order].ravel(),
        page=np.repeat(np.arange(len(order)), each),
        time_ms=np.repeat(time_ms, each),
        value=np.concatenate(values)[order].ravel(),
        worth_V=worth_V,
    )


def forecast(config: MoodConfig, times_ms_H: Int64s, values_H: Float64s, at_ms: int) -> Forecast:
    """What the user's rating at a time will be, given these ratings, less what their items are worth.

    The exact posterior of the process that the stream is drawn from: nothing that reads only these does better.
    """
    prior = config.stable_variance + config.drifting_variance + config.noise_variance
    if not len(values_H):
        return Forecast(0.0, prior)
    known_HH = _covariance(config, times_ms_H[:, None] - times_ms_H)
    known_HH[np.diag_indices(len(values_H))] += config.noise_variance
    cross_H = _covariance(config, at_ms - times_ms_H)
    weight_H = np.linalg.solve(known_HH, cross_H)
    return Forecast(float(weight_H @ values_H), float(prior - weight_H @ cross_H))


def _covariance(config: MoodConfig, gap_ms: Int64s) -> Float64s:
    """Of a user's mood with itself, so long apart."""
    kept = np.exp(-np.abs(gap_ms) / (_HOUR_MS * config.drift_h))
    found: Float64s = config.stable_variance + config.drifting_variance * kept
    return found


def _page_times_h(config: MoodConfig, num_pages: int, rng: np.random.Generator) -> Float64s:
    """float64[P]: hours from a user's beginning to each page."""
    is_new_visit = rng.random(num_pages) < 1 / config.pages_per_visit
    gap_h = np.where(
        is_new_visit,
        rng.exponential(config.hours_between_visits, num_pages),
        rng.exponential(config.minutes_between_pages / 60, num_pages),
    )
    gap_h[0] = 0.0
    return gap_h.cumsum()


def _moods(config: MoodConfig, time_h: Float64s, rng: np.random.Generator) -> Float64s:
    """float64[P] of one user at these times."""
    stable = rng.normal(scale=config.stable_variance**0.5)
    drawn_P = rng.normal(scale=config.drifting_variance**0.5, size=len(time_h))
    kept_P = np.exp(-np.diff(time_h, prepend=-np.inf) / config.drift_h)
    now, drifting_P = 0.0, np.empty(len(time_h))
    for page, kept in enumerate(kept_P):
        now = kept * now + (1 - kept**2) ** 0.5 * drawn_P[page]
        drifting_P[page] = now
    mood_P: Float64s = stable + drifting_P
    return mood_P
