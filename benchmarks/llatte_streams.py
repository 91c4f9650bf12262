"""Streams of the LLaTTE study: ratings in order of time, asked about a page at a time.

Shapes: N ratings, R requests, B requests of a step, V items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from backtest.datasets import movietweetings
from backtest.moods import MoodConfig, MoodStream, mood_stream
from model.ranking_settings import RankingSettings
from online_trainer.item_content import content_vector
from online_trainer.text_content import hashed_ngrams

Int64s = NDArray[np.int64]
Float32s = NDArray[np.float32]
PAGE: Final = 8
"""Ratings of a request at most, where the data do not say."""
_VISIT_MS: Final = 3_600_000
"""Ratings further apart are not of one request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """N ratings, those of a request together, requests in order of time; all of a request are by one user.

    user, item, time_ms: int64[N]. value: float32[N]. offsets: int64[R + 1], where requests begin. like_at: values from
    here on are what is predicted. thresholds: values that tokens tell apart. content: item ids, ascending, and
    float32[V, C] of them; None where nothing is known. simulated: what the stream was drawn from.
    """

    name: str
    user: Int64s
    item: Int64s
    time_ms: Int64s
    value: Float32s
    offsets: Int64s
    like_at: float
    thresholds: tuple[float, ...]
    content: tuple[Int64s, Float32s] | None = None
    simulated: tuple[MoodConfig, MoodStream] | None = None

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.offsets) - 1

    @property
    def likes(self) -> NDArray[np.bool_]:
        """bool[N]: the labels."""
        return self.value >= self.like_at

    def ranking(self) -> RankingSettings:
        """The task, as settings say it."""
        return RankingSettings(
            kind="llatte",
            tasks=(f"value>={self.like_at:g}",),
            learn_from="interactions",
            value_thresholds=self.thresholds,
        )

    def first(self, limit: int) -> Stream:
        """Requests that begin before this many ratings."""
        num_requests = int(np.searchsorted(self.offsets[:-1], limit))
        end = int(self.offsets[num_requests])
        columns = {name: getattr(self, name)[:end] for name in ("user", "item", "time_ms", "value")}
        return replace(self, offsets=self.offsets[: num_requests + 1], **columns)


class Histories:
    """What each request's user had rated before it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._of_user = np.lexsort((np.arange(len(stream.user)), stream.user))
        place = np.empty(len(stream.user), np.int64)
        place[self._of_user] = np.arange(len(stream.user))
        starts = np.flatnonzero(np.diff(stream.user[self._of_user], prepend=-1))
        rows = stream.offsets[:-1]
        self._end = place[rows]
        self._start = starts[np.searchsorted(starts, self._end, side="right") - 1]
        self._time_ms = stream.time_ms[self._of_user]

    def of(self, requests: Int64s, *, max_len: int, stale_ms: int = 0) -> tuple[Int64s, Int64s]:
        """Rows of the stream, the newest max_len of each request's user, and their offsets, int64[B + 1].

        stale_ms: leave out what is as new as that; 0: all that stands before the request is read.
        """
        start, end = self._start[requests], self._end[requests]
        if stale_ms:
            before_ms = self.stream.time_ms[self.stream.offsets[requests]] - stale_ms
            fresh = [
                np.searchsorted(self._time_ms[first:last], ms)
                for first, last, ms in zip(start, end, before_ms, strict=True)
            ]
            end = start + np.array(fresh, np.int64)
        lengths = np.minimum(end - start, max_len)
        offsets = np.concatenate([[0], lengths.cumsum()])
        place = np.arange(offsets[-1]) + np.repeat(end - lengths - offsets[:-1], lengths)
        return self._of_user[place], offsets

    def lengths(self, max_len: int) -> Int64s:
        """int64[R]: what a model of that length reads."""
        return np.asarray(np.minimum(self._end - self._start, max_len))


def moods(limit: int, *, seed: int = 0) -> Stream:
    """Simulated: ``backtest.moods``, as long as users begin as often as they leave."""
    shape = MoodConfig(num_users=1, seed=seed)
    config = replace(shape, num_users=-(-limit // shape.ratings_per_user) + shape.num_users_at_once)
    made = mood_stream(config)
    offsets = np.append(np.flatnonzero(np.diff(made.page, prepend=-1)), len(made.page))
    whole = Stream(
        name="moods",
        user=made.user_id,
        item=made.item_id,
        time_ms=made.time_ms,
        value=made.value.astype(np.float32),
        offsets=offsets,
        like_at=0.0,
        thresholds=(-5.0, -2.5, -1.0, 0.0, 1.0, 2.5, 5.0),
        content=None,
        simulated=(config, made),
    )
    return whole.first(limit)


def films(limit: int) -> Stream:
    """The ratings that ship with headrace, each a request of its own, in their exact order."""
    data = movietweetings()
    rows = pl.read_parquet(data.interactions).sort("timestamp", maintain_order=True).head(limit)
    user, item, time_s = (rows[name].cast(pl.Int64).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    return Stream(
        name="movietweetings",
        user=user,
        item=item,
        time_ms=time_s * 1000,
        value=rows["rating"].cast(pl.Float32).to_numpy(),
        offsets=np.arange(len(user) + 1),
        like_at=8.0,
        thresholds=(5.0, 7.0, 8.0, 9.0),
    )


def ml1m(folder: Path, limit: int) -> Stream:
    """MovieLens-1M. The order of each user's ratings is exact, that between users nearly so (interpolated times); at
    most 8 of a user within an hour of the first are a request.
    """
    rows = pl.read_parquet(folder / "interactions.parquet").filter(pl.col("seq_pos") >= 0).sort("user_id", "seq_pos")
    user, item, time_s = (rows[name].cast(pl.Int64).to_numpy() for name in ("user_id", "item_id", "timestamp"))
    request = pages(user, 1000 * time_s)
    begun_s = time_s[np.flatnonzero(np.diff(request, prepend=-1))][request]
    order = np.lexsort((np.arange(len(user)), request, begun_s))
    request = request[order]
    offsets = np.append(np.flatnonzero(np.diff(request, prepend=-1)), len(user))
    ids = np.unique(item)
    with (folder / "movies.dat").open(encoding="latin-1") as file:
        content = film_content(file.read().splitlines(), ids)
    whole = Stream(
        name="ml-1m",
        user=user[order],
        item=item[order],
        time_ms=1000 * time_s[order],
        value=rows["rating"].cast(pl.Float32).to_numpy()[order],
        offsets=offsets,
        like_at=4.0,
        thresholds=(2.0, 3.0, 4.0, 5.0),
        content=(ids, content),
    )
    return whole.first(limit)


def pages(user: Int64s, time_ms: Int64s) -> Int64s:
    """int64[N], ascending: the request of each rating, given in order of users and of each user's time."""
    request, begun, count, number = np.empty(len(user), np.int64), 0, 0, -1
    for row, (one, at_ms) in enumerate(zip(user.tolist(), time_ms.tolist(), strict=True)):
        if row == 0 or one != user[row - 1] or count == PAGE or at_ms - begun > _VISIT_MS:
            number, begun, count = number + 1, at_ms, 0
        request[row] = number
        count += 1
    return request


def film_content(lines: list[str], ids: Int64s) -> Float32s:
    """float32[V, C] of these films: genres, decade and title, from lines ``id::title (year)::genre|genre``."""
    found = {}
    for line in lines:
        item_id, title, genres = line.split("::")
        kinds = [*(genre for genre in genres.split("|") if genre), f"decade {title.rstrip()[-5:-2]}"]
        found[int(item_id)] = content_vector(None, kinds, hashed_ngrams(title))
    nothing = np.zeros(64, np.float32)
    return np.stack([nothing if (one := found.get(item)) is None else one for item in ids.tolist()])
