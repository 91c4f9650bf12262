"""Keeps vectors up: computes those of users who are due, fills in those of a new version, prunes old ones. Blocking.

No clock ticks and nothing is read from the log in here; `upstream_daemon` decides when what is done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

import numpy as np
from opentelemetry import metrics, trace

from feature_store.user_states import NewVectors
from online_trainer.due_users import DueUser, DueUsers
from online_trainer.upstream_parts import UpstreamParts
from online_trainer.upstream_versions import UpstreamVersions
from online_trainer.vector_batches import compute, compute_all, histories_of
from online_trainer.vector_writer import VectorWrite, VectorWriter
from stream.failpoints import fail_point
from stream.freshness import FV_VECTOR, FreshnessRecorder
from stream.tracing import processing_attributes

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("headrace.upstream")

_DAY_MS: Final = 24 * 3_600_000


class VectorKeeper:
    """The vectors of one model's users; for one thread."""

    def __init__(self, parts: UpstreamParts) -> None:
        self._parts, self._config = parts, parts.config
        self.due = DueUsers(action_mask=parts.config.action_mask(parts.actions), debounce_ms=parts.config.debounce_ms)
        self.writer = VectorWriter(
            parts.store,
            model=parts.model_name,
            log_id=parts.log.log_id,
            topic=parts.log.topics.history_updates,
            clock=parts.clock,
        )
        self.versions = UpstreamVersions(
            parts.model_config,
            root=parts.snapshot_root,
            store=parts.store,
            model=parts.model_name,
            clock=parts.clock,
            keep=parts.config.keep_versions,
        )
        self.freshness = FreshnessRecorder(FV_VECTOR, mode=parts.mode)
        self.committed_s = parts.clock.monotonic_s()
        """When positions were last stored."""
        self.num_written = self.num_refused = self.num_covered = self.lag_ms = 0
        self._prune_after = -1
        meter = metrics.get_meter("headrace.upstream")
        self._durations = meter.create_histogram("headrace.upstream.batch.duration", unit="s")
        self._written = meter.create_counter("headrace.upstream.vectors", unit="{vector}")
        self._refused = meter.create_counter("headrace.upstream.refused", unit="{vector}")
        meter.create_observable_gauge("headrace.upstream.waiting", [self._observe_waiting], unit="{user}")
        meter.create_observable_gauge("headrace.upstream.lag", [self._observe_lag], unit="ms")

    def load(self, partitions: list[int]) -> None:
        """Take over what store and snapshots say. Raises StoreUnavailableError or SnapshotError."""
        self.versions.load()
        self.due.begin(self.writer.load(partitions))

    def is_due(self) -> bool:
        """Whether anybody's vector is to be computed."""
        first_s = self.due.first_due_s()
        return first_s is not None and first_s <= self._parts.clock.monotonic_s()

    def is_behind(self) -> bool:
        """Whether the first event that waits has waited for too long. Notes how long."""
        oldest_ms = self.due.oldest_append_ms()
        self.lag_ms = 0 if oldest_ms is None else max(0, self._parts.clock.now_ms() - oldest_ms)
        return self.lag_ms > self._config.lag_ms + self._config.debounce_ms

    def write_due(self) -> None:
        """Steps 2 to 8 of `vector_writer`, for those who are due; blocking."""
        started_s = self._parts.clock.monotonic_s()
        users = self.due.take(started_s, self._config.batch_users)
        with _tracer.start_as_current_span(
            "headrace.upstream.batch",
            kind=trace.SpanKind.CONSUMER,
            attributes=processing_attributes(self._parts.log.topics.history_updates)
            | {"messaging.batch.message_count": len(users)},
        ) as span:
            try:
                written_at_ms = self._compute_and_commit(users)
            except BaseException:
                self.due.put_back()
                raise
            if written_at_ms is None:
                self.due.put_back()  # somebody was forgotten meanwhile: read and compute again
                return
            self.due.done(users)
            self._durations.record(self._parts.clock.monotonic_s() - started_s)
            if self.versions.in_effect is not None:
                event_ms = np.array([at_ms for one in users for at_ms in one.event_time_ms], np.int64)
                append_ms = np.array([at_ms for one in users for at_ms in one.append_ms], np.int64)
                self.freshness.record(event_ms, append_ms, written_at_ms, span)

    def _compute_and_commit(self, users: list[DueUser]) -> int | None:
        parts, models = self._parts, self.versions.models()
        states = parts.store.user_states
        num_forgotten = states.num_forgotten()
        user_ids = np.array([one.user_id for one in users], np.int64)
        below_seq = np.array([one.below_seq for one in users], np.int64)
        # What was computed since the event, for another event, knows this one as well.
        is_wanted = np.full(len(users), False)
        for version in models:
            is_wanted |= states.newest_seq(parts.model_name, version, user_ids) < below_seq
        vectors: dict[int, NewVectors] = {}
        num_refused = 0
        if is_wanted.any():
            max_len = parts.model_config.upstream.max_len
            current = histories_of(parts.store, user_ids[is_wanted], below_seq[is_wanted], max_len=max_len)
            computed = compute_all(models, current, max_tokens=self._config.batch_tokens)
            vectors = {version: one.vectors for version, one in computed.items()}
            num_refused = sum(len(one.refused) for one in computed.values())
        fail_point("upstream.computed")
        written_at_ms = self._commit(vectors, num_forgotten, num_refused, done=users)
        if written_at_ms is not None:
            self.num_covered += int((~is_wanted).sum()) if models else 0
        return written_at_ms

    def _commit(
        self,
        vectors: dict[int, NewVectors],
        num_forgotten: int,
        num_refused: int,
        *,
        done: list[DueUser],
        filled_up_to: dict[int, int] | None = None,
    ) -> int | None:
        written_at_ms = self.writer.commit(
            VectorWrite(
                vectors=vectors,
                positions=self.due.positions(done),
                num_forgotten=num_forgotten,
                filled_up_to=filled_up_to or {},
            )
        )
        if written_at_ms is not None:
            num_written = sum(len(one.user_id) for one in vectors.values())
            self.num_written, self.num_refused = self.num_written + num_written, self.num_refused + num_refused
            self._written.add(num_written)
            self._refused.add(num_refused)
            self.committed_s = self._parts.clock.monotonic_s()
        return written_at_ms

    def fill(self) -> None:
        """Vectors of the next users for the version being filled; after the last, it takes effect or is given up."""
        filling, parts = self.versions.filling, self._parts
        assert filling is not None, "asked for before"
        states, max_age_d = parts.store.user_states, self._config.backfill_max_age_d
        active_since_ms = states.watermark_ms() - round(max_age_d * _DAY_MS) if max_age_d else 0
        num_forgotten = states.num_forgotten()
        user_ids = states.users_after(
            filling.up_to, limit=self._config.batch_users, active_since_ms=max(active_since_ms, 0)
        )
        if len(user_ids) == 0:
            self._end_fill()
            return
        current = parts.store.read_current(user_ids, max_len=parts.model_config.upstream.max_len)
        computed = compute(filling.model, filling.version, current, max_tokens=self._config.batch_tokens)
        up_to = int(user_ids[-1])
        written_at_ms = self._commit(
            {filling.version: computed.vectors},
            num_forgotten,
            len(computed.refused),
            done=[],
            filled_up_to={filling.version: up_to},
        )
        if written_at_ms is not None:
            filling.up_to = up_to
            filling.num_filled += len(computed.vectors.user_id) + len(computed.refused)
            filling.num_refused += len(computed.refused)

    def _end_fill(self) -> None:
        filling = self.versions.filling
        assert filling is not None, "asked for before"
        if filling.num_refused > self._config.refused_share_max * filling.num_filled:
            logger.error(
                "upstream version %d is given up: %d of %d vectors are not finite; the one before stays in effect",
                filling.version,
                filling.num_refused,
                filling.num_filled,
            )
            self.versions.give_up()
            return
        self.versions.take_effect()

    def store_positions(self) -> None:
        """While nobody is due: how far the log has been read."""
        if self.due.positions() == self.writer.positions:
            self.committed_s = self._parts.clock.monotonic_s()
            return
        self._commit({}, self._parts.store.user_states.num_forgotten(), 0, done=[])

    def prune(self) -> None:
        """One slice of users; see `is_pruned`."""
        settings = self._parts.vectors
        _, next_after = self._parts.store.user_states.prune(
            self._parts.model_name,
            keep_ms=settings.keep_ms,
            states_max=settings.states_max,
            now_ms=self._parts.clock.now_ms(),
            after_user=self._prune_after,
        )
        self._prune_after = -1 if next_after is None else next_after

    @property
    def is_pruned(self) -> bool:
        """Whether the last slice was the last of all."""
        return self._prune_after < 0

    def _observe_waiting(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(self.due.num_waiting)]

    def _observe_lag(self, _options: object) -> Iterable[metrics.Observation]:
        return [metrics.Observation(self.lag_ms)]

    def status(self) -> dict[str, object]:
        """Counts, versions and freshness, JSON-ready."""
        filling = self.versions.filling
        return {
            "vectors": self.num_written,
            "refused": self.num_refused,
            "covered": self.num_covered,
            "asked": self.due.num_asked,
            "waiting": self.due.num_waiting,
            "lag_ms": self.lag_ms,
            "version": self.versions.in_effect,
            "filling": None
            if filling is None
            else {"version": filling.version, "up_to": filling.up_to, "vectors": filling.num_filled},
            "positions": {str(number): position for number, position in self.writer.positions.items()},
            "freshness": {FV_VECTOR: self.freshness.summary(self._parts.clock.now_ms())},
        }
