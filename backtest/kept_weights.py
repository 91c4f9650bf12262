"""Weights kept on disk as the run goes on, by the live publisher: what time travel reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from backtest.batch_feed import ClosedBatch
from backtest.durations import duration_ms
from backtest.run_config import BacktestConfig
from backtest.training import Training
from feature_store.store import FeatureStore
from model.snapshot import POINTER_NAME, list_versions, move_pointer, read_manifest, snapshot_folder
from model.storage import open_storage
from online_trainer.config import TrainerConfig
from online_trainer.publisher import Publisher
from online_trainer.steps import LearnedSteps
from stream.clock import ManualClock

SNAPSHOTS: Final = "snapshots"
MODEL: Final = "backtest"
_WITHOUT_LIMIT: Final = 2**62


class KeptWeights:
    """Publishes one training every so much event time, under a clock that batches move. All versions are kept."""

    def __init__(self, root: Path, config: BacktestConfig, trainer: TrainerConfig, store: FeatureStore) -> None:
        self._root, self._store = root / SNAPSHOTS, store
        self._clock = ManualClock()
        self._publisher: Publisher | None = None
        self._is_on = config.keep_weights_every != "never"
        interval_ms = duration_ms(config.keep_weights_every, "keep_weights_every") if self._is_on else 0
        self._config = replace(
            trainer,
            publish_interval_ms=interval_ms,
            publish_interactions=_WITHOUT_LIMIT,
            keep_anchors=_WITHOUT_LIMIT,
        )

    def after_step(self, training: Training, closed: ClosedBatch, *, is_set_aside: bool) -> None:
        """Publish what is due."""
        learner, batch = training.learner, closed.batch
        self._clock.advance(max(0, closed.closed_ms - self._clock.now_ms()))
        if not self._is_on:
            learner.model.items.clear_dirty()
            return
        if self._publisher is None:
            self._publisher = self._made()
        ledger = learner.ledger
        step = LearnedSteps.of_batch(batch, ledger, at_ms=closed.closed_ms, is_set_aside=is_set_aside)
        event_time_ms = batch.interactions.event_time_ms
        self._publisher.learned(event_time_ms, batch.append_ms, ledger.num_interactions, len(batch.dropped), step)
        if self._publisher.is_due():
            self._publish(training)

    def _made(self) -> Publisher:
        return Publisher(self._root, MODEL, self._config, store=self._store, clock=self._clock, mode="replay")

    def _publish(self, training: Training) -> None:
        assert self._publisher is not None
        training.changed.lend(training.learner.model, training.learner.ledger.num_steps)
        captured = self._publisher.capture(training.learner, traceparent=None)
        if captured is None:
            self._publisher.record_held()
            return
        self._publisher.write(captured)

    def end(self, training: Training) -> None:
        """Publish what no version contains yet."""
        if self._publisher is not None and self._publisher.has_unpublished():
            self._publish(training)

    def begin_again(self, training: Training) -> None:
        """What a restart does: a new publisher, which goes on from what was published."""
        if self._publisher is None:
            return
        unpublished = self._publisher.unpublished()
        self._publisher = self._made()
        self._publisher.resume(unpublished, training.learner.ledger.num_interactions)

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "now_ms": self._clock.now_ms(),
            "newest": max(list_versions(open_storage(self._root), MODEL), default=0) if self._is_on else 0,
            "unpublished": None if self._publisher is None else self._publisher.unpublished(),
        }

    def load_state(self, state: dict[str, Any], training: Training) -> None:
        """Continue from a ``state``: versions of after it are removed, since they come again."""
        self._clock.advance(state["now_ms"])
        if not self._is_on:
            return
        storage, newest = open_storage(self._root), state["newest"]
        if newest:
            move_pointer(storage, read_manifest(storage, MODEL, newest))
        else:
            storage.remove_file(f"{MODEL}/{POINTER_NAME}")
        for version in list_versions(storage, MODEL):
            if version > newest:
                storage.remove_folder(snapshot_folder(MODEL, version))
        if state["unpublished"] is not None:
            self._publisher = self._made()
            self._publisher.resume(state["unpublished"], training.learner.ledger.num_interactions)
