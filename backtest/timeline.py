"""The catalogue, lateness and drift as the stream goes on: what curves are drawn over."""

from __future__ import annotations

from collections.abc import Sequence

from backtest.batch_feed import ClosedBatch
from backtest.run_files import RunWriter
from online_trainer.drift import DriftDecision
from online_trainer.learner import OnlineLearner
from stream.commit import IngestCounts


class Timeline:
    """A row every so much event time, at the end of a batch."""

    def __init__(self, writer: RunWriter, interval_ms: int) -> None:
        self._writer, self._interval_ms = writer, interval_ms
        self._before: dict[str, int] = {}
        self._due_ms: int | None = None

    def look(
        self,
        closed: ClosedBatch,
        learner: OnlineLearner,
        counts: IngestCounts,
        decisions: Sequence[DriftDecision],
    ) -> None:
        """After a batch; `decisions` are written each, the rest if it is time."""
        event = int(closed.offsets[-1])
        for decision in decisions:
            self._writer.add_drift(
                event=event,
                time_ms=closed.closed_ms,
                detector=decision.detector,
                signal=decision.signal,
                reactions=",".join(decision.reactions),
                sentence=decision.without_time(),
            )
        if self._due_ms is not None and closed.closed_ms < self._due_ms:
            return
        self._due_ms = closed.closed_ms + self._interval_ms
        now = {
            "num_items": learner.num_items,
            "num_retired_items": learner.ledger.num_items_retired,
            "num_interactions": learner.ledger.num_interactions,
            "num_late": counts.num_late,
            "num_refused": sum(counts.num_refused.values()),
        }
        since = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._writer.add_timeline(
            event=event,
            time_ms=closed.closed_ms,
            num_items=now["num_items"],
            num_new_items=since["num_items"] + since["num_retired_items"],
            num_retired_items=since["num_retired_items"],
            num_interactions=since["num_interactions"],
            num_late=since["num_late"],
            num_refused=since["num_refused"],
        )
        self._before = now

    def state(self) -> dict[str, object]:
        """JSON-ready."""
        return {"before": self._before, "due_ms": self._due_ms}

    def load_state(self, state: dict[str, object]) -> None:
        """Continue from a ``state``."""
        before, due_ms = state["before"], state["due_ms"]
        assert isinstance(before, dict)
        assert due_ms is None or isinstance(due_ms, int)
        self._before, self._due_ms = before, due_ms
