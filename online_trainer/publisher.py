"""When and what the trainer publishes: snapshots of the weights, with the account of what is inside."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opentelemetry import metrics
from torch import Tensor

from feature_store.errors import StoreUnavailableError
from feature_store.records import PublishedSnapshot
from feature_store.store import FeatureStore
from model.errors import SnapshotError
from model.manifest import Manifest
from model.snapshot import (
    RowBlock,
    list_versions,
    prune_snapshots,
    read_manifest,
    read_pointer,
    write_snapshot,
)
from model.swap import take_rows
from online_trainer.config import TrainerConfig
from online_trainer.learner import OnlineLearner
from stream.clock import Clock
from stream.failpoints import fail_point
from stream.freshness import F3_PUBLISHED, AgeHistogram, FreshnessRecorder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CapturedSnapshot:
    """Copies of what a snapshot contains, taken between two steps."""

    manifest: Manifest
    dense: dict[str, Tensor]
    rows: RowBlock


@dataclass(frozen=True, slots=True)
class Published:
    """One snapshot on disk."""

    manifest: Manifest
    num_bytes: int
    seconds: float


class Publisher:
    """Publishes one model's snapshots under `root`, at the cadence of the configuration."""

    def __init__(
        self, root: Path, model_name: str, config: TrainerConfig, *, store: FeatureStore, clock: Clock, mode: str
    ) -> None:
        self._root, self._model_name, self._config, self._store, self._clock = root, model_name, config, store, clock
        self.freshness = FreshnessRecorder(F3_PUBLISHED, mode=mode)
        self._version = self._newest_version()
        # What changed since the newest snapshot is unknown after a start: begin with an anchor.
        self._anchor_next = True
        self._num_since_anchor = 0
        self._num_unpublished = 0
        self._last_publish_s = clock.monotonic_s()
        self._event_times: list[NDArray[np.int64]] = []
        self._append_times: list[NDArray[np.int64]] = []
        self._num_already_published = self._published_interactions()
        self.newest: Published | None = None
        meter = metrics.get_meter("headrace.online_trainer")
        self._durations = meter.create_histogram("headrace.snapshot.publish.duration", unit="s")
        self._sizes = meter.create_histogram("headrace.snapshot.size", unit="By")

    def _newest_version(self) -> int:
        """Newest finished version, also when the pointer had no time to move to it."""
        return max(list_versions(self._root, self._model_name), default=0)

    def _published_interactions(self) -> int:
        pointer = read_pointer(self._root, self._model_name)
        if pointer is None:
            return 0
        try:
            return read_manifest(self._root, self._model_name, pointer.version).lineage.num_interactions
        except SnapshotError as error:
            logger.warning("the newest snapshot cannot be read, an anchor will replace it: %s", error)
            return 0

    def learned(
        self, event_time_ms: NDArray[np.int64], append_ms: NDArray[np.int64], num_interactions: int, num_dropped: int
    ) -> None:
        """Note what a step learned from or dropped; `num_interactions` is the ledger's total after it.

        After a restart from a checkpoint, the interactions learned again are in a published snapshot already:
        they are neither counted again nor published until the trainer has passed that snapshot.
        """
        num_new = min(len(event_time_ms) + num_dropped, num_interactions - self._num_already_published)
        if num_new <= 0:
            return
        self._event_times.append(event_time_ms[-num_new:])
        self._append_times.append(append_ms[-num_new:])
        self._num_unpublished += num_new

    def is_due(self) -> bool:
        """Whether the time or count limit since the last snapshot has passed."""
        if not self._num_unpublished:
            return False
        waited_ms = (self._clock.monotonic_s() - self._last_publish_s) * 1000
        return (
            waited_ms >= self._config.publish_interval_ms or self._num_unpublished >= self._config.publish_interactions
        )

    def has_unpublished(self) -> bool:
        """Whether something was learned since the last snapshot."""
        return self._num_unpublished > 0

    def capture(self, learner: OnlineLearner, *, traceparent: str | None) -> CapturedSnapshot | None:
        """Copy what the next snapshot contains; call between steps. None: the gate holds it back."""
        self._last_publish_s = self._clock.monotonic_s()
        if not learner.weights_are_finite():
            logger.error("weights are not finite: snapshot %d is held back", self._version + 1)
            return None
        if learner.drift.holds_publishing:
            return None
        as_anchor = self._anchor_next or self._num_since_anchor + 1 >= self._config.anchor_every
        created_at_ms = self._clock.now_ms()
        rows = take_rows(learner.model, "anchor" if as_anchor else "delta")
        learner.model.items.clear_dirty()
        manifest = Manifest(
            model=self._model_name,
            version=self._version + 1,
            kind="anchor" if as_anchor else "delta",
            parent=None if as_anchor else self._version,
            config_hash=learner.model.config.config_hash(),
            model_config=learner.model.config.as_dict(),
            num_items=learner.num_items,
            created_at_ms=created_at_ms,
            watermark_ms=learner.ledger.watermark_ms,
            lineage=learner.ledger.lineage(),
            event_age=_ages(self._event_times, created_at_ms),
            append_age=_ages(self._append_times, created_at_ms),
            metrics=learner.metrics_summary(),
            traceparent=traceparent,
        )
        self._version += 1
        self._anchor_next = False
        self._num_since_anchor = 0 if as_anchor else self._num_since_anchor + 1
        self._num_unpublished = 0
        self._event_times, self._append_times = [], []
        return CapturedSnapshot(manifest, learner.model.dense_state(), rows)

    def write(self, captured: CapturedSnapshot) -> Published:
        """Write a captured snapshot, move the pointer, note it in the store. Blocking; for a thread of its own.

        Raises SnapshotError, OSError (disk full) or StoreUnavailableError; the next snapshot is then an anchor.
        """
        started_s = self._clock.monotonic_s()
        try:
            manifest = write_snapshot(self._root, captured.manifest, captured.dense, captured.rows)
            fail_point("trainer.snapshot_written")
            published_at_ms = self._clock.now_ms()
            self._record_freshness(manifest, published_at_ms)
            self._store.record_published(_stored(manifest, published_at_ms))
            prune_snapshots(self._root, self._model_name, anchors_kept=self._config.keep_anchors)
        except (SnapshotError, OSError, StoreUnavailableError):
            self._anchor_next = True
            raise
        num_bytes = sum(file.size for file in manifest.files.values())
        self.newest = Published(manifest, num_bytes, self._clock.monotonic_s() - started_s)
        self._durations.record(self.newest.seconds, {"headrace.snapshot.kind": manifest.kind})
        self._sizes.record(num_bytes, {"headrace.snapshot.kind": manifest.kind})
        return self.newest

    def _record_freshness(self, manifest: Manifest, published_at_ms: int) -> None:
        delay_ms = published_at_ms - manifest.created_at_ms
        self.freshness.record_histograms(
            AgeHistogram.from_dict(manifest.event_age).shifted(delay_ms),
            AgeHistogram.from_dict(manifest.append_age).shifted(delay_ms),
        )


def _ages(times_ms: list[NDArray[np.int64]], now_ms: int) -> dict[str, Any]:
    ages = AgeHistogram()
    for times in times_ms:
        ages.add(now_ms - times)
    return ages.to_dict()


def _stored(manifest: Manifest, published_at_ms: int) -> PublishedSnapshot:
    return PublishedSnapshot(
        model=manifest.model,
        version=manifest.version,
        kind=manifest.kind,
        parent=manifest.parent,
        created_at_ms=manifest.created_at_ms,
        published_at_ms=published_at_ms,
        watermark_ms=manifest.watermark_ms,
        lineage=asdict(manifest.lineage) | {"fingerprint": str(manifest.lineage.fingerprint)},
        event_age=manifest.event_age,
        append_age=manifest.append_age,
        metrics=manifest.metrics,
        traceparent=manifest.traceparent,
    )
