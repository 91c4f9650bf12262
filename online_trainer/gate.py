"""Whether a snapshot may be published: what it was measured at, and what that is compared with.

Everything compared is a windowed prequential metric, taken on interactions before they were learned from. The guard
against the popularity baseline compares on the same events, so that a stream that has become harder for everybody
holds nothing back; the guard against the recent best level does not, and is off by default.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

from model.errors import SnapshotFormatError
from model.small_records import checked_record
from model.snapshot import model_folder
from model.storage import SnapshotRoot, open_storage
from online_trainer.config import TrainerConfig

Reason = Literal["weights", "metrics", "baseline", "drop"]
_EPISODES_KEPT: Final = 20
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBack:
    """Why a snapshot is held back, for people and for programs."""

    reason: Reason
    sentence: str
    evidence: dict[str, float]


class PublishGate:
    """Judges each snapshot before it is taken."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._levels: deque[tuple[int, float]] = deque()

    def judge(self, metrics: Mapping[str, float], *, weights_are_finite: bool, now_ms: int) -> HeldBack | None:
        """None: publish. metrics: `OnlineLearner.metrics_summary()`."""
        if not weights_are_finite:
            return HeldBack(reason="weights", sentence="weights are not finite", evidence={})
        broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if broken:
            return HeldBack(reason="metrics", sentence=f"{', '.join(broken)} not finite", evidence={})
        value = self._value(metrics)
        if value is None:
            return None
        return self._below_baseline(value, metrics) or self._below_level(value, now_ms)

    def published(self, metrics: Mapping[str, float], at_ms: int) -> None:
        """Note the level of a snapshot that was published at `at_ms`."""
        value = self._value(metrics)
        if value is not None and math.isfinite(value):
            self._levels.append((at_ms, value))
            self._forget(at_ms)

    def _value(self, metrics: Mapping[str, float]) -> float | None:
        """The judged metric; None while too little was evaluated."""
        enough = min(self._config.gate_min_evaluated, self._config.metrics_window)
        if metrics.get("model.window.count", 0) < enough:
            return None
        return metrics.get(f"model.window.{self._config.gate_metric}")

    def _below_baseline(self, value: float, metrics: Mapping[str, float]) -> HeldBack | None:
        name, share = self._config.gate_metric, self._config.gate_baseline_min
        baseline = metrics.get(f"popularity.window.{name}", 0.0)
        if value >= share * baseline:
            return None
        return HeldBack(
            reason="baseline",
            sentence=f"windowed {name} is {value:.4f}, below {share:g} times popularity's {baseline:.4f}",
            evidence={"value": value, "baseline": baseline, "gate_baseline_min": share},
        )

    def _below_level(self, value: float, now_ms: int) -> HeldBack | None:
        self._forget(now_ms)
        drop, name = self._config.gate_drop_max, self._config.gate_metric
        if drop == 0 or not self._levels:
            return None
        level = max(value for _, value in self._levels)
        if value >= (1 - drop) * level:
            return None
        return HeldBack(
            reason="drop",
            sentence=f"windowed {name} is {value:.4f}, more than {drop:.0%} below {level:.4f}, the best published in "
            f"the last {self._config.gate_memory_s:g} s",
            evidence={"value": value, "level": level, "gate_drop_max": drop},
        )

    def _forget(self, now_ms: int) -> None:
        # A level that nothing reaches any more must not hold back for ever.
        while self._levels and self._levels[0][0] < now_ms - self._config.gate_memory_s * 1000:
            self._levels.popleft()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldEpisode:
    """Snapshots held back one after another; times in epoch ms.

    version: the one that would have been published. ended_by: the one that was published next; None while it lasts.
    """

    since_ms: int
    last_ms: int
    num_attempts: int
    version: int
    num_interactions: int
    reason: Reason
    sentence: str
    evidence: dict[str, float]
    ended_by: int | None = None

    def again(self, held: HeldBack, at_ms: int, num_interactions: int) -> HeldEpisode:
        """The same episode after one more attempt, with the newest reason."""
        return replace(
            self,
            last_ms=at_ms,
            num_attempts=self.num_attempts + 1,
            num_interactions=num_interactions,
            reason=held.reason,
            sentence=held.sentence,
            evidence=held.evidence,
        )


def read_held(root: SnapshotRoot, model: str) -> list[HeldEpisode]:
    """What was held back, oldest first: `<model>/held.json`. SnapshotFormatError if it cannot be read."""
    storage, name = open_storage(root), f"{model_folder(model)}/held.json"
    try:
        content = storage.read(name, size_max=_MAX_BYTES)
    except FileNotFoundError:
        return []
    try:
        return [checked_record(HeldEpisode, episode) for episode in json.loads(content)["episodes"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SnapshotFormatError(f"{storage.place(name)} cannot be read ({error!r}): delete it") from error


def write_held(root: SnapshotRoot, model: str, episodes: list[HeldEpisode]) -> None:
    """Replace what is known of held snapshots; the newest 20 episodes are kept."""
    content = {"episodes": [asdict(episode) for episode in episodes[-_EPISODES_KEPT:]]}
    open_storage(root).publish(f"{model_folder(model)}/held.json", json.dumps(content, indent=1).encode())
