"""Streaming metrics of predicted values, such as seconds watched: how far off, and whether that beats the item's mean.

* **RMSE**: root of the mean squared difference of prediction and value, in the value's own unit.
* **Item mean**: the baseline on the same labels: the mean value of the item so far, shrunk towards the mean of all
  items by `PSEUDO_COUNT` labels. `rmse_to_item_mean` below 1: the model knows more than what an item is like.
* **Bias**: mean prediction - mean value.

Given before learning from a label, they are prequential. Absent: all but the count while there is no label.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from model.item_table import RowMoves

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]

PSEUDO_COUNT: Final = 10.0
"""Labels of the mean of all that an item's mean starts with."""
_FIRST_ROWS: Final = 1_024


@dataclass(frozen=True, slots=True)
class ValueMetrics:
    """Over `count` predictions with their values; None where it is not defined."""

    count: int
    rmse: float | None = None
    rmse_item_mean: float | None = None
    rmse_to_item_mean: float | None = None
    bias: float | None = None

    @classmethod
    def of(cls, count: int, squared: float, squared_of_mean: float | None, error: float) -> ValueMetrics:
        """From sums over `count` labels: of squared errors, of the baseline's (None: there is none), and of errors."""
        if not count:
            return cls(0)
        rmse = float(np.sqrt(squared / count))
        if squared_of_mean is None:
            return cls(count, rmse, bias=error / count)
        of_mean = float(np.sqrt(squared_of_mean / count))
        return cls(count, rmse, of_mean, rmse / of_mean if of_mean else None, error / count)


class ItemMeans:
    """The mean value of each item so far, by its row of the item table."""

    def __init__(self) -> None:
        self._of_row = torch.zeros(_FIRST_ROWS, 2, dtype=torch.float64)
        """[V, 2] number and sum of values."""
        self._total = np.zeros(2)

    def of(self, rows: Int64s) -> Float64s:
        """[N] what the baseline predicts; 0 before the first value of all."""
        overall = self._total[1] / max(self._total[0], 1.0)
        self._make_room(rows)
        seen = self._of_row[torch.from_numpy(rows)].numpy()
        mean: Float64s = (seen[:, 1] + PSEUDO_COUNT * overall) / (seen[:, 0] + PSEUDO_COUNT)
        return mean

    def add(self, rows: Int64s, values: Float64s) -> None:
        """Learn values float[N] of the items in these rows."""
        self._make_room(rows)
        added = torch.from_numpy(np.stack([np.ones(len(rows)), values], axis=1))
        self._of_row.index_add_(0, torch.from_numpy(rows), added)
        self._total += (len(values), values.sum())

    def follow(self, moves: RowMoves) -> None:
        """Move what is kept of items as ``ItemTable.remove`` moved their rows."""
        self._make_room(np.array([moves.num_before - 1]))
        moves.follow(self._of_row)

    def _make_room(self, rows: Int64s) -> None:
        needed = int(rows.max(initial=-1)) + 1
        if needed > len(self._of_row):
            grown = torch.zeros(max(needed, 2 * len(self._of_row)), 2, dtype=torch.float64)
            grown[: len(self._of_row)] = self._of_row
            self._of_row = grown

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        return {"of_row": self._of_row.numpy().copy(), "total": self._total.copy()}

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``."""
        self._of_row = torch.from_numpy(state["of_row"].astype(np.float64))
        self._total = state["total"].astype(np.float64)


class ValueMeter:
    """Metrics of one predicted value over the whole run and over the newest `window` labels, beside the baseline.

    May be read from another thread than the one that adds.
    """

    def __init__(self, window: int, *, has_baseline: bool = True) -> None:
        """has_baseline: whether the item's mean is kept and measured as well; else its metrics are None."""
        self._lock = threading.Lock()
        self._errors = np.full((window, 2), np.nan)
        """Of the ring's places: prediction - value, of the model and of the baseline. NaN: nothing is there yet."""
        self._num_seen = 0
        self._sums = np.zeros(3)
        """Lifetime: squared errors, the baseline's, and errors."""
        self._means = ItemMeans() if has_baseline else None
        self.num_not_finite = 0
        """Predictions that were no finite number: left out of everything else."""

    def add(self, rows: Int64s, predicted: Float64s, values: Float64s) -> None:
        """Add predictions float[N] with their values float[N], of items in these rows, in stream order."""
        is_finite = np.isfinite(predicted)
        of_mean = values if self._means is None else self._means.of(rows)
        errors = np.stack([predicted - values, of_mean - values], axis=1)[is_finite]
        if self._means is not None:
            self._means.add(rows, values)
        with self._lock:
            self.num_not_finite += int((~is_finite).sum())
            self._sums += (*(errors**2).sum(0), errors[:, 0].sum())
            self._num_seen += len(errors)
            self._write(errors)

    def _write(self, errors: Float64s) -> None:
        """Put the newest at the ring's end, which `_num_seen` is already past."""
        num_kept = min(len(errors), len(self._errors))
        slots = (self._num_seen - num_kept + np.arange(num_kept)) % len(self._errors)
        self._errors[slots] = errors[len(errors) - num_kept :]

    def follow(self, moves: RowMoves) -> None:
        """See ItemMeans."""
        if self._means is not None:
            self._means.follow(moves)

    def lifetime(self) -> ValueMetrics:
        """Over everything so far."""
        with self._lock:
            squared, squared_of_mean, error = self._sums.tolist()
            return self._metrics(self._num_seen, squared, squared_of_mean, error)

    def windowed(self) -> ValueMetrics:
        """Over the newest `window`."""
        with self._lock:
            errors = self._errors[np.isfinite(self._errors[:, 0])]
        squared, squared_of_mean = (errors**2).sum(0).tolist()
        return self._metrics(len(errors), squared, squared_of_mean, float(errors[:, 0].sum()))

    def _metrics(self, count: int, squared: float, squared_of_mean: float, error: float) -> ValueMetrics:
        return ValueMetrics.of(count, squared, None if self._means is None else squared_of_mean, error)

    def summary(self) -> dict[str, float]:
        """`span.metric`, and `lifetime.not_finite`; absent where it is not defined."""
        named = {
            f"{span}.{name}": value
            for span, metrics in (("lifetime", self.lifetime()), ("window", self.windowed()))
            for name, value in asdict(metrics).items()
            if value is not None
        }
        return named | {"lifetime.not_finite": self.num_not_finite}

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        means = {} if self._means is None else self._means.state()
        return {
            "errors": self._errors.copy(),
            "counts": np.array([self._num_seen, self.num_not_finite]),
            "sums": self._sums.copy(),
            **{f"means.{name}": array for name, array in means.items()},
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``; of another window, with as many of the newest as there are."""
        errors = state["errors"].astype(np.float64)
        self._num_seen, self.num_not_finite = (int(number) for number in state["counts"])
        self._sums = state["sums"].astype(np.float64)
        by_age = errors[(self._num_seen + np.arange(len(errors))) % len(errors)]
        self._errors[:] = np.nan
        self._write(by_age[np.isfinite(by_age[:, 0])])
        if self._means is not None:
            self._means.load_state({n.removeprefix("means."): a for n, a in state.items() if n.startswith("means.")})
