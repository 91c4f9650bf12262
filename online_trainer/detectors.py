"""river's change detectors, one-sided and with evidence, their states as plain JSON.

Both are fed one value per tested interaction and tell when the mean has *risen*. river is imported with the first
detector: it brings pandas and scipy, 2 s and 81 MiB, which a trainer with drift detection turned off never pays.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from online_trainer.drift_config import DriftConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rise:
    """What a detector saw: the mean of `num_before` values, and of the `num_after` that followed."""

    mean_before: float
    mean_after: float
    num_before: int
    num_after: int


class Detector(Protocol):
    """Tells when the mean of a signal has risen."""

    def update(self, value: float) -> Rise | None:
        """Take one value; what was found, if it was now. Starts over after that."""

    def state(self) -> dict[str, Any]:
        """Everything a later update depends on, JSON-ready."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state()`, bit by bit; start over, saying so, when it is of other settings or another river."""


def build_detector(name: str, config: DriftConfig) -> Detector:
    """`adwin` or `page_hinkley`."""
    return AdwinDetector(config.adwin_delta) if name == "adwin" else PageHinkleyDetector(config)


class AdwinDetector:
    """ADWIN (Bifet and Gavaldà 2007): a window that is cut while any two parts of it have different means.

    Its evidence is what was cut and what was kept; the change need not lie in between.
    """

    def __init__(self, delta: float) -> None:
        from river.drift import ADWIN  # noqa: PLC0415 - see the module

        self._origin: dict[str, Any] = {"river": version("river"), "delta": delta}
        self._adwin = ADWIN(delta=delta)  # type: ignore[no-untyped-call]

    def update(self, value: float) -> Rise | None:
        """See `Detector`."""
        adwin = self._adwin
        total, width = adwin.total, adwin.width
        if adwin.drift_detected:  # river empties the window with the next value
            total, width = 0.0, 0
        adwin.update(value)  # type: ignore[no-untyped-call]
        if not adwin.drift_detected:
            return None
        num_dropped, num_kept = int(width) + 1 - int(adwin.width), int(adwin.width)
        mean_before = (total + value - adwin.total) / num_dropped
        if adwin.estimation <= mean_before:
            return None
        return Rise(mean_before=mean_before, mean_after=adwin.estimation, num_before=num_dropped, num_after=num_kept)

    def state(self) -> dict[str, Any]:
        """See `Detector`. The window is as river itself writes it: bytes of numbers, in hex."""
        window: bytes = self._adwin._helper.__getstate__()  # noqa: SLF001 - river has no public form
        return {**self._origin, "drift_detected": self._adwin.drift_detected, "window": window.hex()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Detector`."""
        if not _fits(state, self._origin):
            return
        self._adwin._helper.__setstate__(bytes.fromhex(state["window"]))  # noqa: SLF001
        self._adwin._drift_detected = state["drift_detected"]  # noqa: SLF001


class PageHinkleyDetector:
    """Page-Hinkley: a cumulative sum of deviations from the mean, which signals when it leaves its minimum behind."""

    def __init__(self, config: DriftConfig) -> None:
        from river.drift import PageHinkley  # noqa: PLC0415 - see the module

        delta, threshold = config.page_hinkley_delta, config.page_hinkley_threshold
        self._origin: dict[str, Any] = {"river": version("river"), "delta": delta, "threshold": threshold}
        # Nothing is forgotten: under river's default, the sum of a small lasting rise would never reach the threshold.
        self._page_hinkley = PageHinkley(delta=delta, threshold=threshold, alpha=1.0, mode="up")
        self._num_since, self._sum_since = 0, 0.0

    def update(self, value: float) -> Rise | None:
        """See `Detector`."""
        detector = self._page_hinkley
        if detector.drift_detected:  # river starts over with the next value
            self._num_since, self._sum_since = 0, 0.0
        detector.update(value)  # type: ignore[no-untyped-call]
        # The sum's minimum is the likeliest place of the change.
        if detector._sum_increase == detector._min_increase:  # noqa: SLF001 - river does not say where it is
            self._num_since, self._sum_since = 0, 0.0
        else:
            self._num_since, self._sum_since = self._num_since + 1, self._sum_since + value
        if not detector.drift_detected:
            return None
        mean = detector._x_mean  # noqa: SLF001
        num_before = int(mean.n) - self._num_since
        return Rise(
            mean_before=(mean.get() * mean.n - self._sum_since) / num_before,
            mean_after=self._sum_since / self._num_since,
            num_before=num_before,
            num_after=self._num_since,
        )

    def state(self) -> dict[str, Any]:
        """See `Detector`."""
        detector, mean = self._page_hinkley, self._page_hinkley._x_mean  # noqa: SLF001
        return {
            **self._origin,
            "drift_detected": detector.drift_detected,
            "n": mean.n,
            "mean": mean.get(),
            "sum": detector._sum_increase,  # noqa: SLF001
            "minimum": detector._min_increase if mean.n else None,  # noqa: SLF001 - infinite before the first value
            "num_since": self._num_since,
            "sum_since": self._sum_since,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Detector`."""
        if not _fits(state, self._origin):
            return
        from river.stats import Mean  # noqa: PLC0415 - see the module

        detector = self._page_hinkley
        detector._drift_detected = state["drift_detected"]  # noqa: SLF001
        detector._x_mean = Mean._from_state(n=state["n"], mean=state["mean"])  # noqa: SLF001
        detector._sum_increase = state["sum"]  # noqa: SLF001
        detector._min_increase = float("inf") if state["minimum"] is None else state["minimum"]  # noqa: SLF001
        self._num_since, self._sum_since = state["num_since"], state["sum_since"]


def _fits(state: dict[str, Any], origin: dict[str, Any]) -> bool:
    differing = [name for name, value in origin.items() if state.get(name) != value]
    if differing:
        logger.warning("a drift detector starts over: the checkpoint's has another %s", " and ".join(differing))
    return not differing
