"""Streaming metrics of predicted actions: how far a probability can be believed, and whether it orders well.

For predictions p and labels y in {0, 1}:

* **NE**, normalised entropy: mean log loss / entropy of the mean label (CE / H(p) of He et al., ADKDD 2014, as the
  papers on HSTU, ULTRA-HSTU and LLaTTE use it). 1 is as good as always saying the mean, 0 is perfect.
* **AUC**: share of pairs of a positive and a negative that p puts in the right order, an equal pair counts as half.
  Exact over the window. Over the lifetime from counts in bins of the logit, 1/128 wide from -16 to 16 with everything
  beyond in the bins at the ends: pairs within one bin count as half, so it is off by at most half their share, which
  is given beside it (`auc_error_max`).
* **Calibration**: mean prediction / mean label.

Given before learning from a label, they are prequential. Absent: NE and AUC while all labels are equal, calibration
while there is no positive one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]

_LOGIT_MAX: Final = 16.0
_BINS_PER_UNIT: Final = 128
_NUM_BINS: Final = int(2 * _LOGIT_MAX) * _BINS_PER_UNIT


@dataclass(frozen=True, slots=True)
class ActionMetrics:
    """Over `count` labelled predictions; None where it is not defined."""

    count: int
    ne: float | None = None
    auc: float | None = None
    auc_error_max: float | None = None
    calibration: float | None = None


@dataclass(frozen=True, slots=True)
class _Sums:
    count: int = 0
    positives: int = 0
    log_loss: float = 0.0
    predicted: float = 0.0

    @classmethod
    def of(cls, logits: Float64s, labels: Int64s) -> _Sums:
        # log(1 + e^z) - y z, and 1 / (1 + e^-z): exact where the sigmoid would round to 0 or 1.
        log_losses = np.logaddexp(0, logits) - labels * logits
        predicted = np.exp(-np.logaddexp(0, -logits))
        return cls(len(logits), int(labels.sum()), float(log_losses.sum()), float(predicted.sum()))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.positives + other.positives,
            self.log_loss + other.log_loss,
            self.predicted + other.predicted,
        )

    def metrics(self, auc: float | None, auc_error_max: float | None) -> ActionMetrics:
        mean = self.positives / self.count if self.count else 0.0
        ne = None
        if 0 < mean < 1:
            ne = self.log_loss / self.count / -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean))
        calibration = self.predicted / self.positives if self.positives else None
        return ActionMetrics(self.count, None if ne is None else float(ne), auc, auc_error_max, calibration)


class ActionMeter:
    """Metrics of one task over the whole run and over the newest `window` labelled predictions.

    What it costs does not grow with the run. May be read from another thread than the one that adds.
    """

    def __init__(self, window: int) -> None:
        self._lock = threading.Lock()
        self._logits = np.zeros(window)
        self._labels = np.full(window, -1, np.int64)
        """Of the ring's places; -1: nothing is there yet."""
        self._num_seen = 0
        self._total = _Sums()
        self._bins = np.zeros((2, _NUM_BINS), np.int64)
        """Lifetime: how many negatives and positives have a logit in each bin."""
        self.num_not_finite = 0
        """Predictions that were no finite number: left out of everything else."""

    def add(self, logits: Float64s, labels: Int64s) -> None:
        """Add predictions float[N] (logits) with their labels int[N], in stream order.

        ValueError for a label that is neither 0 nor 1.
        """
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels of an action must be 0 or 1; leave out those that are not known")
        is_finite = np.isfinite(logits)
        logits, labels = logits[is_finite].astype(np.float64), labels[is_finite].astype(np.int64)
        bins = np.clip((logits + _LOGIT_MAX) * _BINS_PER_UNIT, 0, _NUM_BINS - 1).astype(np.int64)
        added = np.bincount(labels * _NUM_BINS + bins, minlength=2 * _NUM_BINS).reshape(2, _NUM_BINS)
        sums = _Sums.of(logits, labels)
        with self._lock:
            self.num_not_finite += int((~is_finite).sum())
            self._total, self._bins = self._total + sums, self._bins + added
            self._num_seen += len(logits)
            self._write(logits, labels)

    def _write(self, logits: Float64s, labels: Int64s) -> None:
        """Put the newest at the ring's end, which `_num_seen` is already past."""
        num_kept = min(len(logits), len(self._logits))
        slots = (self._num_seen - num_kept + np.arange(num_kept)) % len(self._logits)
        newest = slice(len(logits) - num_kept, None)
        self._logits[slots], self._labels[slots] = logits[newest], labels[newest]

    def lifetime(self) -> ActionMetrics:
        """Over everything so far."""
        with self._lock:
            total, (negative, positive) = self._total, self._bins
        pairs = total.positives * (total.count - total.positives)
        if not pairs:
            return total.metrics(None, None)
        in_one_bin = float((positive * negative).sum()) / 2 / pairs
        in_order = float((positive * (np.cumsum(negative) - negative)).sum()) / pairs
        return total.metrics(in_order + in_one_bin, in_one_bin)

    def windowed(self) -> ActionMetrics:
        """Over the newest `window`."""
        with self._lock:
            is_there = self._labels >= 0
            logits, labels = self._logits[is_there], self._labels[is_there]
        sums = _Sums.of(logits, labels)
        if not 0 < sums.positives < sums.count:
            return sums.metrics(None, None)
        negative, positive = np.sort(logits[labels == 0]), logits[labels == 1]
        below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
        return sums.metrics(float(below.mean() / 2 / len(negative)), 0.0)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        total = self._total
        return {
            "logits": self._logits.copy(),
            "labels": self._labels.copy(),
            "bins": self._bins.copy(),
            "counts": np.array([self._num_seen, total.count, total.positives, self.num_not_finite]),
            "sums": np.array([total.log_loss, total.predicted]),
        }

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``; of another window, with as many of the newest as there are."""
        logits, labels = state["logits"].astype(np.float64), state["labels"].astype(np.int64)
        self._num_seen, count, positives, self.num_not_finite = (int(n) for n in state["counts"])
        by_age = (self._num_seen + np.arange(len(labels))) % len(labels)
        by_age = by_age[labels[by_age] >= 0]
        self._labels[:] = -1
        self._write(logits[by_age], labels[by_age])
        self._total = _Sums(count, positives, float(state["sums"][0]), float(state["sums"][1]))
        self._bins = state["bins"].astype(np.int64)


class ActionMeters:
    """One ``ActionMeter`` for each task of a ranking head, by the task's name."""

    def __init__(self, tasks: tuple[str, ...], window: int) -> None:
        self._meters = {task: ActionMeter(window) for task in tasks}

    def __getitem__(self, task: str) -> ActionMeter:
        return self._meters[task]

    def measured(self) -> dict[tuple[str, str], ActionMetrics]:
        """(task, `lifetime` or `window`) -> metrics; from any thread."""
        spans = {
            task: (("lifetime", meter.lifetime()), ("window", meter.windowed())) for task, meter in self._meters.items()
        }
        return {(task, span): metrics for task, of_task in spans.items() for span, metrics in of_task}

    def summary(self) -> dict[str, float]:
        """`task.span.metric`, and `task.lifetime.not_finite`; absent where it is not defined."""
        named = {
            f"{task}.{span}.{name}": value
            for (task, span), metrics in self.measured().items()
            for name, value in asdict(metrics).items()
            if value is not None
        }
        return named | {f"{task}.lifetime.not_finite": meter.num_not_finite for task, meter in self._meters.items()}

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Copies that ``load_state`` reads back."""
        return {f"{task}.{n}": array for task, meter in self._meters.items() for n, array in meter.state().items()}

    def load_state(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Continue from a ``state``; a task that is not in it starts empty."""
        for task, meter in self._meters.items():
            of_task = {n.removeprefix(f"{task}."): array for n, array in state.items() if n.startswith(f"{task}.")}
            if of_task:
                meter.load_state(of_task)
