"""When a worker goes back to the version before, by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When an inference worker goes back to the version before, by itself."""

    enabled: bool = True
    """Watch what each version answers, and go back when a guard trips. False: nothing is watched."""
    answers_min: int = 200
    """Answers that a version, or several that came quickly after one another, is judged by, against those of the last
    version that passed. Fewer would call chance a change; more let a bad version answer for longer."""
    failure_share_max: float = 0.05
    """Trips when the share of requests that the model failed to answer is this much above what it was before."""
    score_distance_max: float = 0.3
    """Trips when the scores of answers are distributed otherwise than before: largest distance between the two
    cumulative distributions (Kolmogorov-Smirnov, 0 to 1). Scores of a young model move a lot, so the limit is also
    twice the largest distance among the last 8 versions that passed, and the first 3 only show what is ordinary."""
    latency_ratio_max: float = 3.0
    """Trips when the 90th percentile of the model's time for a micro-batch is this many times what it was before,"""
    latency_ms_min: float = 200.0
    """and above this (ms): what nobody notices is no reason, nor are user states that a swap has to compute anew."""
    cooldown_ms: int = 30_000
    """After a trip, newer versions are taken only after this time (ms): they build on the one that was turned away. It
    doubles with each trip in a row, up to 64 times."""
    check_ms: int = 500
    """Time (ms) between looks at what the guards have seen."""

    def __post_init__(self) -> None:
        for name in ("answers_min", "check_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"guards.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("failure_share_max", "score_distance_max"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"guards.{name} = {getattr(self, name)}: must lie above 0 and be at most 1 (1: never)")
        if not self.latency_ratio_max >= 1:
            raise ValueError(f"guards.latency_ratio_max = {self.latency_ratio_max}: must be at least 1")
        for name in ("latency_ms_min", "cooldown_ms"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"guards.{name} = {getattr(self, name)}: must not be negative")
