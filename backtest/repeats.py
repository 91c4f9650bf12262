"""Finds events that come more than once in a log of any length: hashes in files on disk, compared file by file.

Two event ids, or two events, count as equal if 64-bit hashes are: so do they in a history.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

_NUM_BITS: Final = 6
"""2**6 files: a hundred million events are 25 MB in each."""


class RepeatFinder(AbstractContextManager["RepeatFinder"]):
    """16 bytes of disk an event; memory for one file."""

    def __init__(self, folder: Path) -> None:
        self._files = [(folder / f"hashes-{number:02d}").open("wb") for number in range(2**_NUM_BITS)]
        self.has_ids = False
        """Whether some event has an id of its own."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, events: pl.DataFrame) -> None:
        """Note each event's identity: its id, or user, item, time and action where the log has none."""
        self.has_ids |= events["event_id"].null_count() < events.height
        whole = pl.struct("user_id", "item_id", "event_time_ms", "action").hash(seed=0)
        own = pl.col("event_id").hash(seed=1)
        hashes = events.select(pl.when(pl.col("event_id").is_null()).then(whole).otherwise(own)).to_series().to_numpy()
        bucket = (hashes >> np.uint64(64 - _NUM_BITS)).astype(np.int64)
        pairs = np.stack([hashes.view(np.int64), events["row"].to_numpy()], 1)[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._files)))
        for file, low, high in zip(self._files, np.concatenate([[0], ends[:-1]]), ends, strict=True):
            file.write(pairs[low:high].tobytes())

    def rows(self) -> Int64s:
        """Rows whose event equals that of an earlier row, ascending."""
        found = []
        for file in self._files:
            file.flush()
            pairs = np.fromfile(file.name, np.int64).reshape(-1, 2)
            hashes, rows = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
            found.append(rows[1:][hashes[1:] == hashes[:-1]])
        return np.sort(np.concatenate(found))
