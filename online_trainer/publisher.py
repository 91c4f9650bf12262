"""When and what the trainer publishes: snapshots of the weights, with the account of what is inside."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from opentelemetry import metrics, trace
from torch import Tensor

from feature_store.errors import StoreUnavailableError
from feature_store.records import PublishedSnapshot
from feature_store.store import FeatureStore
from model.errors import SnapshotError, SnapshotFormatError
from model.listing import DAMAGED
from model.manifest import Manifest
from model.retention import SnapshotRetention
from model.snapshot import RowBlock, list_versions, read_manifest, write_snapshot
from model.storage import SnapshotRoot, open_storage
from model.swap import take_rows
from online_trainer.ages import AgesUpTo, PendingAges
from online_trainer.config import TrainerConfig
from online_trainer.gate import HeldBack, HeldEpisode, PublishGate, read_held, write_held
from online_trainer.learner import OnlineLearner
from online_trainer.steps import LearnedSteps, bounded
from stream.clock import Clock
from stream.failpoints import fail_point
from stream.freshness import F3_PUBLISHED, AgeHistogram, AgePair, FreshnessRecorder

logger = logging.getLogger(__name__)

_UNRECORDED_MAX: Final = 1_000
"""Publications that may wait for the store; the account of older ones is given up."""


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
        self,
        root: SnapshotRoot,
        model_name: str,
        config: TrainerConfig,
        *,
        store: FeatureStore,
        clock: Clock,
        mode: str,
        config_hash: str | None = None,
    ) -> None:
        """config_hash: of the model; snapshots of another hold nothing that it learned. None: there are none."""
        self._root, self._model_name, self._config = open_storage(root), model_name, config
        self._store, self._clock = store, clock
        self.freshness = FreshnessRecorder(F3_PUBLISHED, mode=mode)
        self._gate = PublishGate(config)
        self._retention = SnapshotRetention(
            self._root,
            model_name,
            anchors_kept=config.keep_anchors,
            replica_timeout_ms=round(config.replica_timeout_s * 1000),
        )
        # Newest finished version, also when the pointer had no time to move to it or is pinned elsewhere.
        self._version = max(list_versions(self._root, model_name), default=0)
        # What changed since the newest snapshot is unknown after a start: begin with an anchor.
        self._anchor_next = True
        self._num_since_anchor = 0
        self._num_learned = 0
        self._num_unpublished = 0
        self._num_since_attempt = 0
        self._last_publish_s = clock.monotonic_s()
        self._event_ages, self._append_ages = PendingAges(), PendingAges()
        self._steps: list[LearnedSteps] = []
        self._unfinished: AgesUpTo | None = None
        self._num_already_published = 0
        self._already_published_to: dict[int, int] = {}
        """Partition → source offset up to which the newest snapshot contains it; empty once that has been passed."""
        self._reached: dict[int, int] = {}
        """Of these partitions: where learning has come to since the start."""
        self._unrecorded: deque[tuple[Manifest, int]] = deque(maxlen=_UNRECORDED_MAX)
        self._may_be_unrecorded = self._newest_manifest(config_hash)
        self._held = self._read_held()
        self.newest: Published | None = None
        meter = metrics.get_meter("headrace.online_trainer")
        self._durations = meter.create_histogram("headrace.snapshot.publish.duration", unit="s")
        self._sizes = meter.create_histogram("headrace.snapshot.size", unit="By")
        self._num_held = meter.create_counter("headrace.snapshot.held", unit="{snapshot}")

    def _newest_manifest(self, config_hash: str | None) -> Manifest | None:
        """Of the newest finished version; what it contains and how good it was is where publishing goes on."""
        if self._version == 0:
            return None
        try:
            newest = read_manifest(self._root, self._model_name, self._version)
        except DAMAGED as error:  # not where the storage is away: then it may be whole
            logger.warning("the newest snapshot cannot be read, an anchor will replace it: %s", error)
            return None
        if config_hash not in {None, newest.config_hash}:
            logger.warning("the newest snapshot is of another [model] configuration: what is learned replaces it")
            return newest
        self._num_already_published = newest.lineage.num_interactions
        self._already_published_to = dict(newest.lineage.positions)
        self._gate.published(newest.metrics, newest.created_at_ms)
        return newest

    def _read_held(self) -> list[HeldEpisode]:
        try:
            return read_held(self._root, self._model_name)
        except SnapshotFormatError as error:
            logger.warning("what was held back before is not known: %s", error)
            return []

    def learned(
        self,
        event_time_ms: NDArray[np.int64],
        append_ms: NDArray[np.int64],
        num_interactions: int,
        num_dropped: int,
        step: LearnedSteps,
    ) -> None:
        """Note what a step learned from or only took (dropped); `num_interactions` is the ledger's total after it.

        After a restart from a checkpoint, the interactions learned again are in a published snapshot already:
        they are neither counted again nor published until the trainer has passed that snapshot.
        """
        self._num_learned = num_interactions
        self._pass_published(step)
        num_new = min(len(event_time_ms) + num_dropped, num_interactions - self._num_already_published)
        if num_new <= 0:
            return
        now_ms = self._clock.now_ms()
        self._event_ages.add(event_time_ms[-num_new:], now_ms)
        self._append_ages.add(append_ms[-num_new:], now_ms)
        self._steps = list(bounded([*self._steps, step]))
        self._num_unpublished += num_new
        self._num_since_attempt += num_new

    def _pass_published(self, step: LearnedSteps) -> None:
        """Note how far a step came; behind the newest snapshot everywhere, what is learned is new, whatever the count.

        A trainer that starts over because its checkpoints are lost counts from 0, and of a log whose beginning has
        expired it would count as many interactions again only long after that.
        """
        if self._num_learned >= self._num_already_published:
            self._already_published_to = {}
        if not self._already_published_to:
            return
        self._reached |= {part: at for part, at in step.positions.items() if part in self._already_published_to}
        behind = [self._reached.get(part, 0) - at for part, at in self._already_published_to.items()]
        if min(behind) >= 0:
            self._num_already_published = max(0, self._num_learned - sum(behind))
            self._already_published_to = {}

    def learned_labels(self, num_labels: int) -> None:
        """Note what the ranking head learned from: worth a snapshot also while there are no interactions."""
        if self._num_learned >= self._num_already_published:
            self._num_unpublished += num_labels
            self._num_since_attempt += num_labels

    def is_due(self) -> bool:
        """Whether the time or count limit since the last snapshot, published or held back, has passed."""
        if not self._num_since_attempt:
            return False
        waited_ms = (self._clock.monotonic_s() - self._last_publish_s) * 1000
        return (
            waited_ms >= self._config.publish_interval_ms
            or self._num_since_attempt >= self._config.publish_interactions
        )

    def has_unpublished(self) -> bool:
        """Whether something was learned since the last snapshot."""
        return self._num_unpublished > 0

    @property
    def held(self) -> HeldEpisode | None:
        """Why nothing is published at present; None while snapshots pass the gate."""
        return self._held[-1] if self._held and self._held[-1].ended_by is None else None

    def capture(self, learner: OnlineLearner, *, traceparent: str | None) -> CapturedSnapshot | None:
        """Copy what the next snapshot contains; call between steps. None: the gate holds it back (`record_held`)."""
        self._last_publish_s = self._clock.monotonic_s()
        self._num_since_attempt = 0
        created_at_ms, measured = self._clock.now_ms(), learner.metrics_summary()
        held = self._gate.judge(measured, weights_are_finite=learner.weights_are_finite(), now_ms=created_at_ms)
        if held is not None:
            self._hold_back(held, created_at_ms, learner.ledger.num_interactions)
            return None
        if learner.drift.holds_publishing:
            return None
        as_anchor = self._anchor_next or self._num_since_anchor + 1 >= self._config.anchor_every
        ages = self._unfinished = self._take_ages(created_at_ms, learner.ledger.num_interactions)
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
            lineage=learner.lineage(),
            event_age=ages.event_age.to_dict(),
            append_age=ages.append_age.to_dict(),
            metrics=measured,
            row_precision=self._config.row_precision,
            traceparent=traceparent,
            steps=[step.to_dict() for step in ages.steps],
        )
        self._version += 1
        self._anchor_next = False
        self._num_since_anchor = 0 if as_anchor else self._num_since_anchor + 1
        self._num_unpublished = 0
        return CapturedSnapshot(manifest, learner.model.dense_state(), rows)

    def _take_ages(self, now_ms: int, num_interactions: int) -> AgesUpTo:
        """Of everything learned up to `num_interactions` that is in no finished snapshot."""
        ages = AgesUpTo(
            num_interactions,
            now_ms,
            self._event_ages.take(now_ms),
            self._append_ages.take(now_ms),
            tuple(self._steps),
        )
        self._steps = []
        return ages if self._unfinished is None else ages.with_earlier(self._unfinished)

    def unpublished(self) -> dict[str, Any]:
        """Ages of what no finished snapshot contains, JSON-ready: for the checkpoint. Call between steps."""
        now_ms, total = self._clock.now_ms(), self._num_learned
        event_age, append_age = self._event_ages.as_of(now_ms), self._append_ages.as_of(now_ms)
        ages = [AgesUpTo(total, now_ms, event_age, append_age, tuple(self._steps))]
        unfinished = self._unfinished
        if unfinished is not None:
            ages.insert(0, unfinished)
        return {"ages": [one.to_dict() for one in ages]}

    def resume(self, unpublished: dict[str, Any], num_interactions: int) -> None:
        """Go on from `unpublished` of a checkpoint that was taken after `num_interactions`."""
        self._num_learned = num_interactions
        if num_interactions <= self._num_already_published:
            return
        self._num_unpublished = self._num_since_attempt = num_interactions - self._num_already_published
        for one in (AgesUpTo.of_dict(stored) for stored in unpublished["ages"]):
            # A snapshot that was being written has been finished after all, or its ages are still to be published.
            if one.num_interactions > self._num_already_published:
                self._unfinished = one if self._unfinished is None else one.with_earlier(self._unfinished)

    def _hold_back(self, held: HeldBack, at_ms: int, num_interactions: int) -> None:
        self._num_held.add(1, {"headrace.reason": held.reason})
        if self.held is not None:
            self._held[-1] = self.held.again(held, at_ms, num_interactions)
            return
        version = self._version + 1
        logger.error("snapshot %d is held back, the last good one stays: %s", version, held.sentence)
        episode = HeldEpisode(
            since_ms=at_ms,
            last_ms=at_ms,
            num_attempts=1,
            version=version,
            num_interactions=num_interactions,
            **asdict(held),
        )
        self._held.append(episode)

    def record_held(self) -> None:
        """Write what is held back beside the snapshots. Blocking, like `write`; raises SnapshotError or OSError."""
        write_held(self._root, self._model_name, list(self._held))

    def write(self, captured: CapturedSnapshot) -> Published:
        """Write a captured snapshot, move the pointer, note it in the store. Blocking; for a thread of its own.

        Raises SnapshotError or OSError (disk full): the next snapshot is then an anchor. Raises StoreUnavailableError
        when it is published and not noted; that is made up for with the next one.
        """
        started_s = self._clock.monotonic_s()
        try:
            manifest = write_snapshot(
                self._root,
                self._told_its_parent(captured.manifest),
                captured.dense,
                captured.rows,
                reached=lambda stage: fail_point(f"trainer.snapshot_{stage}"),
            )
        except (SnapshotError, OSError):
            self._anchor_next = True
            # It is to be tried again also where nothing more is learned: the stream may have gone quiet.
            self._num_unpublished += 1
            self._num_since_attempt += 1
            raise
        fail_point("trainer.snapshot_written")
        self._unfinished = None
        published_at_ms = self._clock.now_ms()
        num_bytes = sum(file.size for file in manifest.files.values())
        self.newest = Published(manifest, num_bytes, self._clock.monotonic_s() - started_s)
        self._gate.published(manifest.metrics, manifest.created_at_ms)
        self._record_freshness(manifest, published_at_ms)
        self._durations.record(self.newest.seconds, {"headrace.snapshot.kind": manifest.kind})
        self._sizes.record(num_bytes, {"headrace.snapshot.kind": manifest.kind})
        self._note_in_store(manifest, published_at_ms)
        fail_point("trainer.snapshot_recorded")
        self._clean_up(manifest, published_at_ms)
        return self.newest

    def _told_its_parent(self, manifest: Manifest) -> Manifest:
        """Only now is what comes before finished, and its hash known."""
        if manifest.parent is None:
            return manifest
        assert self.newest is not None, "the first of a life is an anchor"
        assert self.newest.manifest.version == manifest.parent, "after a failure comes an anchor"
        return replace(manifest, parent_hash=self.newest.manifest.content_hash())

    def _note_in_store(self, manifest: Manifest, published_at_ms: int) -> None:
        self._unrecorded.append((manifest, published_at_ms))
        interrupted = self._may_be_unrecorded
        if interrupted is not None:
            # A crash may have come between finishing the newest snapshot and noting it.
            known = self._store.published_snapshots(self._model_name, interrupted.version - 1)
            if all(one.version != interrupted.version for one in known):
                self._unrecorded.appendleft((interrupted, published_at_ms))
            self._may_be_unrecorded = None
        while self._unrecorded:
            self._store.record_published(_stored(*self._unrecorded[0]))
            self._unrecorded.popleft()

    def _clean_up(self, manifest: Manifest, now_ms: int) -> None:
        """Say that nothing is held back any more, and delete what is not needed; a failure is only worth a warning."""
        try:
            if self.held is not None:
                logger.warning(
                    "snapshot %d has passed the gate after %d attempts", manifest.version, self.held.num_attempts
                )
                self._held[-1] = replace(self.held, ended_by=manifest.version)
                self.record_held()
            if manifest.kind == "anchor":
                self._retention.prune(now_ms)
                fail_point("trainer.snapshots_pruned")
                self._prune_publications(now_ms)
                fail_point("trainer.publications_pruned")
        except (SnapshotError, OSError, StoreUnavailableError) as error:
            logger.warning("snapshot %d is published; afterwards: %s", manifest.version, error)

    def _prune_publications(self, now_ms: int) -> None:
        # After the files: what is still stored may be pinned, served or gone back to, and its rows are asked for.
        before_ms = now_ms - round(self._config.keep_publications_d * 86_400_000)
        kept = frozenset(list_versions(self._root, self._model_name))
        while self._store.prune_publications(self._model_name, before_ms=before_ms, kept=kept):
            continue

    def _record_freshness(self, manifest: Manifest, published_at_ms: int) -> None:
        delay_ms = published_at_ms - manifest.created_at_ms
        ages = AgePair(AgeHistogram.from_dict(manifest.event_age), AgeHistogram.from_dict(manifest.append_age))
        self.freshness.record_ages(ages.shifted(delay_ms), published_at_ms, trace.get_current_span())


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
        steps=manifest.steps,
    )
