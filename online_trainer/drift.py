"""From what the test of each step says to decisions about drift, and what is in force because of them. No I/O.

Signals, one value per tested interaction:

* loss: -log p(target) over the live catalogue, divided by the log of its size. 1 is the loss of guessing, so that
  settings mean the same for every catalogue.
* calibration: probability of the most probable item minus whether it was the target. 0 in the mean for a calibrated
  model, above it for one that is surer than it should be, which is what a model is after a change.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry.util.types import AttributeValue

from kernels.softmax_loss import LogitSummary
from online_trainer.detectors import Rise, build_detector
from online_trainer.drift_config import DETECTORS, SIGNALS, DriftConfig, Reaction

Signals = Mapping[str, NDArray[np.float64]]
"""float64[P] by name of the signal, in the order of the test."""


def signals_of(summary: LogitSummary, *, num_items: int) -> Signals:
    """The signals of a step's test. num_items: size of the live catalogue that the logits are over."""
    loss_P = summary.loss_P / math.log(max(num_items, 2))
    is_top_P = (summary.target_P == summary.top_P).to(loss_P.dtype)
    calibration_P = (summary.top_P - summary.log_sum_P).exp() - is_top_P
    return {"loss": loss_P.double().cpu().numpy(), "calibration": calibration_P.double().cpu().numpy()}


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftDecision:
    """One decision and its evidence."""

    detector: str
    signal: str
    reactions: tuple[Reaction, ...]
    """What began with it; what is already in force is not begun again."""
    mean_before: float
    mean_after: float
    num_before: int
    """Interactions behind `mean_before`; `num_after` likewise: about where the change is."""
    num_after: int
    step: int
    num_tested: int
    """Interactions tested up to and including the one that gave the alarm."""
    event_time_ms: int
    """Watermark of the step that learned of it."""

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> DriftDecision:
        """Read `asdict`'s form, also after JSON."""
        return cls(**(stored | {"reactions": tuple(stored["reactions"])}))

    def what(self) -> dict[str, AttributeValue]:
        """Attributes of the counter of decisions."""
        return {
            "headrace.drift.detector": self.detector,
            "headrace.drift.signal": self.signal,
            "headrace.drift.reactions": ",".join(self.reactions),
        }

    def evidence(self) -> dict[str, AttributeValue]:
        """What a span event tells beside `what`."""
        names = ("mean_before", "mean_after", "num_before", "num_after", "step", "num_tested", "event_time_ms")
        return {f"headrace.drift.{name}": getattr(self, name) for name in names}

    def sentence(self) -> str:
        """For a log."""
        return f"drift: {self._found()}; step {self.step}, event time {self.event_time_ms} ms: {self._reaction()}"

    def without_time(self) -> str:
        """Where the time stands beside it."""
        return f"{self._found()}: {self._reaction()}"

    def _found(self) -> str:
        return (
            f"{self.detector} on {self.signal}: mean {self.mean_before:.4f} of {self.num_before} interactions, "
            f"then {self.mean_after:.4f} of {self.num_after}"
        )

    def _reaction(self) -> str:
        return ", ".join(self.reactions) or "what it asks for is in force"


@dataclass(slots=True)
class _Hold:
    """Publishing waits for a signal's moving mean to come down to a level."""

    signal: str
    level: float
    mean: float
    weight: float
    """Of one new value in the moving mean."""
    until_ms: int


class DriftMonitor:
    """Detectors, decisions, and what is in force: a function of the signals and their order."""

    def __init__(self, config: DriftConfig) -> None:
        self._config = config
        self._detectors = {
            (detector, signal): build_detector(detector, config)
            for detector in DETECTORS
            for signal in SIGNALS
            if config.reactions(f"{detector}_{signal}")
        }
        self.num_tested = 0
        self.num_decisions = 0
        self.decisions: deque[DriftDecision] = deque(maxlen=config.decisions_kept)
        self._boost_from: int | None = None
        self._rehearse_from: int | None = None
        self._rehearse_since_ms = 0
        self._replay_from: int | None = None
        self._hold: _Hold | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is any detector."""
        return bool(self._detectors)

    @property
    def learning_rate_factors(self) -> tuple[float, float]:
        """What the learning rates of item rows and of dense parameters are multiplied by now; 1 without a boost."""
        since = self._since(self._boost_from, self._config.boost_interactions)
        if since is None:
            return 1.0, 1.0
        left = 1.0 - since / self._config.boost_interactions
        factors = self._config.boost_row_factor, self._config.boost_dense_factor
        if self._config.boost_cool_down == "exponential":
            return factors[0] ** left, factors[1] ** left
        return 1.0 + (factors[0] - 1.0) * left, 1.0 + (factors[1] - 1.0) * left

    @property
    def rehearse_since_ms(self) -> int | None:
        """Event time (ms) after which interactions are to be learned from again; None: no rehearsal."""
        since = self._since(self._rehearse_from, self._config.rehearse_interactions)
        return None if since is None else self._rehearse_since_ms

    @property
    def replay_share(self) -> float | None:
        """The replay share in force because of drift; None: as configured elsewhere."""
        since = self._since(self._replay_from, self._config.replay_interactions)
        return None if since is None else self._config.replay_share

    @property
    def holds_publishing(self) -> bool:
        """Whether snapshots are to wait."""
        return self._hold is not None

    def _since(self, begun: int | None, length: int) -> int | None:
        """Interactions tested since something in force began; None if it is not, or no longer."""
        if begun is None or self.num_tested - begun >= length:
            return None
        return self.num_tested - begun

    def observe(self, signals: Signals, *, step: int, event_time_ms: int) -> list[DriftDecision]:
        """Take the signals of one step's test; the decisions they lead to, oldest first. `step`: its number."""
        if not self.is_on:
            return []
        first, made = self.num_tested, []
        for offset, values in enumerate(zip(*(signals[name].tolist() for name in SIGNALS), strict=True)):
            self.num_tested = first + offset + 1
            of_signal = dict(zip(SIGNALS, values, strict=True))
            self._follow_hold(of_signal, event_time_ms)
            for (detector, signal), instance in self._detectors.items():
                rise = instance.update(of_signal[signal])
                if rise is not None and self.num_tested > self._config.warm_up_interactions:
                    made.append(self._decide(detector, signal, rise, step, event_time_ms))
        return made

    def _decide(self, detector: str, signal: str, rise: Rise, step: int, event_time_ms: int) -> DriftDecision:
        begun = tuple(
            reaction
            for reaction in self._config.reactions(f"{detector}_{signal}")
            if self._begin(reaction, signal, rise, event_time_ms)
        )
        decision = DriftDecision(
            detector=detector,
            signal=signal,
            reactions=begun,
            **asdict(rise),
            step=step,
            num_tested=self.num_tested,
            event_time_ms=event_time_ms,
        )
        self.num_decisions += 1
        self.decisions.append(decision)
        return decision

    def _begin(self, reaction: Reaction, signal: str, rise: Rise, event_time_ms: int) -> bool:
        """Put a reaction in force; False if it is already."""
        match reaction:
            case "boost":
                if self._since(self._boost_from, self._config.boost_interactions) is not None:
                    return False
                self._boost_from = self.num_tested
            case "rehearse":
                if self.rehearse_since_ms is not None:
                    return False
                self._rehearse_from, self._rehearse_since_ms = self.num_tested, event_time_ms
            case "replay":
                if self.replay_share is not None:
                    return False
                self._replay_from = self.num_tested
            case "hold":
                if self._hold is not None:
                    return False
                self._hold = _Hold(
                    signal=signal,
                    level=rise.mean_after - self._config.hold_return * (rise.mean_after - rise.mean_before),
                    mean=rise.mean_after,
                    weight=1.0 / max(rise.num_after, 100),
                    until_ms=event_time_ms + int(self._config.hold_max_s * 1000),
                )
            case "alert" | "rollback":  # nothing to remember: the decision itself says it
                pass
        return True

    def _follow_hold(self, of_signal: dict[str, float], event_time_ms: int) -> None:
        hold = self._hold
        if hold is None:
            return
        hold.mean += hold.weight * (of_signal[hold.signal] - hold.mean)
        if hold.mean <= hold.level or event_time_ms >= hold.until_ms:
            self._hold = None

    def summary(self) -> dict[str, Any]:
        """For `/status`, JSON-ready."""
        newest = self.decisions[-1] if self.decisions else None
        return {
            "decisions": self.num_decisions,
            "newest": None if newest is None else asdict(newest),
            "learning_rate_factors": list(self.learning_rate_factors),
            "rehearses": self.rehearse_since_ms is not None,
            "replay_share": self.replay_share,
            "holds_publishing": self.holds_publishing,
        }

    def state(self) -> dict[str, Any]:
        """Everything a later decision depends on, JSON-ready; `load_state` reads it back."""
        return {
            "num_tested": self.num_tested,
            "num_decisions": self.num_decisions,
            "decisions": [asdict(decision) for decision in self.decisions],
            "boost_from": self._boost_from,
            "rehearse_from": self._rehearse_from,
            "rehearse_since_ms": self._rehearse_since_ms,
            "replay_from": self._replay_from,
            "hold": None if self._hold is None else asdict(self._hold),
            "detectors": {f"{detector}_{signal}": one.state() for (detector, signal), one in self._detectors.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue bit by bit; a detector that was not on then begins afresh, and without any nothing is in force."""
        self.num_tested, self.num_decisions = state["num_tested"], state["num_decisions"]
        decisions = (DriftDecision.from_dict(stored) for stored in state["decisions"])
        self.decisions = deque(decisions, maxlen=self._config.decisions_kept)
        self._boost_from, self._replay_from = state["boost_from"], state["replay_from"]
        self._rehearse_from, self._rehearse_since_ms = state["rehearse_from"], state["rehearse_since_ms"]
        self._hold = None if state["hold"] is None else _Hold(**state["hold"])
        if not self.is_on:
            # Whoever turned detection off has ended what it began: without tested interactions nothing else would.
            self._boost_from = self._rehearse_from = self._replay_from = self._hold = None
        for (detector, signal), one in self._detectors.items():
            if (stored := state["detectors"].get(f"{detector}_{signal}")) is not None:
                one.load_state(stored)
