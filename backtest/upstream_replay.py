"""Vectors of users in a replay: computed when a daemon that keeps up would have, by versions that learned before.

After the first high-value event that a user's vector does not know, the debounce passes; then it is computed from all
that had arrived by then, and is there. With each batch the upstream model learns what the trainer learns; when a
version is due it takes effect at the batch's end, with a vector for everybody who was there lately. So a vector depends
on nothing later than itself, and which one a label is learned with is a function of the log.

Readers differ in how late vectors reach them (`VectorsAsOf.lag_ms`), which costs nothing more to compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backtest.batch_feed import ClosedBatch
from feature_store.config import HotHistoriesConfig
from feature_store.hot import HotHistories
from feature_store.interactions import Interactions
from feature_store.reading import CurrentHistories
from feature_store.store import FeatureStore
from feature_store.user_states import NewVectors
from model.upstream_config import UpstreamModelConfig
from model.upstream_model import UpstreamModel
from online_trainer.checkpoint import Checkpoint
from online_trainer.learner_config import LearnerConfig
from online_trainer.upstream_learner import UpstreamLearner
from online_trainer.upstream_settings import UpstreamDaemonConfig
from online_trainer.vector_batches import compute
from online_trainer.vectors_as_of import VectorsAsOf

Int64s = NDArray[np.int64]

MODEL: Final = "backtest"
"""The name that vectors are kept under."""
_DAY_MS: Final = 24 * 3_600_000
_ALL: Final = 1 << 30
_USERS_PER_PRUNE: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamConfigs:
    """What the upstream model is, and how it is kept up."""

    model: UpstreamModelConfig
    daemon: UpstreamDaemonConfig

    def with_seed(self, seed: int) -> UpstreamConfigs:
        """For one run of a sweep."""
        upstream = replace(self.model.upstream, seed=seed)
        return UpstreamConfigs(model=replace(self.model, upstream=upstream), daemon=replace(self.daemon, seed=seed))


@dataclass(slots=True)
class _Waiting:
    """A user whose vector is to be computed: when (epoch ms), and of which arrivals."""

    due_ms: int
    below_seq: int


@dataclass(slots=True)
class _Seen:
    """What has come of a user: its next arrival number, and event time of its newest interaction."""

    next_seq: int
    newest_ms: int


class UpstreamReplay:
    """The upstream daemon's work at the moments of a replay. `compute_due` before a batch is learned, `learn` after."""

    def __init__(
        self,
        configs: UpstreamConfigs,
        store: FeatureStore,
        hot: HotHistoriesConfig,
        *,
        log_id: str,
        learner: LearnerConfig,
    ) -> None:
        """learner: of the ranker that reads the vectors."""
        # The trainer's threads are the process's.
        configs = replace(configs, daemon=replace(configs.daemon, num_threads=0))
        self._configs, self._store = configs, store
        self._mask = configs.daemon.action_mask(learner.actions)
        max_len = configs.model.upstream.max_len
        self._learner = UpstreamLearner(
            configs.model,
            configs.daemon,
            HotHistories(store, replace(hot, max_len=max_len, budget_bytes=configs.daemon.history_bytes)),
            log_id=log_id,
            ranking=learner.ranking,
            items=learner.items,
        )
        self._version, self._released_ms, self._released_interactions = 0, 0, 0
        self._serving: UpstreamModel | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._seen: dict[int, _Seen] = {}
        self._readers: list[tuple[int, VectorsAsOf]] = []
        self.num_computed = 0
        """Vectors, of all versions."""

    def reader(self, lag_ms: int) -> VectorsAsOf:
        """Reads vectors, each so long after it was computed."""
        width = self._configs.model.upstream.width
        reader = VectorsAsOf(self._store, model=MODEL, width=width, lag_ms=lag_ms)
        self._readers.append((lag_ms, reader))
        return reader

    def compute_due(self, closed: ClosedBatch) -> None:
        """Vectors that become due until the batch closes, each of what had arrived by then."""
        due = self._due(closed.batch.interactions, closed.closed_ms)
        if self._serving is None or not due:
            return
        batch_users = self._configs.daemon.batch_users
        for start in range(0, len(due), batch_users):
            part = due[start : start + batch_users]
            users, below_seq, due_ms = (np.array(column, np.int64) for column in zip(*part, strict=True))
            self._compute(users, below_seq, due_ms)

    def _due(self, new: Interactions, closed_ms: int) -> list[tuple[int, int, int]]:
        """(user, below which arrival number, when), in order of when."""
        due = []
        is_asking = (new.action & np.uint32(self._mask)) != 0
        debounce_ms = self._configs.daemon.debounce_ms
        for user_id, seq, arrival_ms, event_time_ms, asks in zip(
            new.user_id.tolist(),
            new.seq.tolist(),
            new.arrival_ms.tolist(),
            new.event_time_ms.tolist(),
            is_asking.tolist(),
            strict=True,
        ):
            waiting = self._waiting.get(user_id)
            if waiting is not None and waiting.due_ms < arrival_ms:
                due.append((user_id, waiting.below_seq, waiting.due_ms))
                del self._waiting[user_id]
                waiting = None
            if waiting is not None:
                waiting.below_seq = max(waiting.below_seq, seq + 1)
            elif asks:
                self._waiting[user_id] = _Waiting(arrival_ms + debounce_ms, seq + 1)
            seen = self._seen.setdefault(user_id, _Seen(0, 0))
            seen.next_seq, seen.newest_ms = max(seen.next_seq, seq + 1), max(seen.newest_ms, event_time_ms)
        for user_id in [one for one, waiting in self._waiting.items() if waiting.due_ms < closed_ms]:
            waiting = self._waiting.pop(user_id)
            due.append((user_id, waiting.below_seq, waiting.due_ms))
        return sorted(due, key=lambda one: (one[2], one[0]))

    def _compute(self, users: Int64s, below_seq: Int64s, at_ms: Int64s) -> None:
        assert self._serving is not None, "there is a version"
        upstream = self._configs.model.upstream
        # As of then: the store has gone on to the end of the poll.
        histories = self._store.read(
            users, max_len=upstream.max_len, below_seq=below_seq, watermark_ms=self._learner.ledger.watermark_ms
        )
        current = CurrentHistories(histories=histories, next_seq=below_seq, watermark_ms=0)
        found = compute(self._serving, self._version, current, max_tokens=self._configs.daemon.batch_tokens)
        vectors = found.vectors
        at_ms_of = dict(zip(zip(users.tolist(), below_seq.tolist(), strict=True), at_ms.tolist(), strict=True))
        keys = zip(vectors.user_id.tolist(), vectors.next_seq.tolist(), strict=True)
        written_at_ms = np.array([at_ms_of[key] for key in keys], np.int64)
        with self._store.transaction() as transaction:
            transaction.user_states.write(MODEL, self._version, vectors, written_at_ms=written_at_ms)
        self.num_computed += len(vectors.user_id)

    def learn(self, closed: ClosedBatch) -> None:
        """Learn a batch; release a version if that is due."""
        self._learner.step(closed.batch)
        daemon = self._configs.daemon
        num_new = self._learner.num_learned_from - self._released_interactions
        if self._serving is None:
            is_due = num_new >= daemon.first_version_interactions
        else:
            is_rested = closed.closed_ms - self._released_ms >= 1000 * daemon.version_interval_s
            is_due = num_new >= daemon.version_interactions and is_rested
        if is_due and daemon.learn_share > 0 and self._learner.weights_are_finite():
            self._release(closed.closed_ms)

    def _release(self, at_ms: int) -> None:
        """A version of the present weights takes effect, with the vectors of everybody who was there lately."""
        own = self._learner.model
        self._serving = UpstreamModel(own.config).eval()
        self._serving.load_dense_state(own.dense_state())
        self._serving.items.load_state_dict(own.items.state_dict())
        self._version, self._released_ms = self._version + 1, at_ms
        self._released_interactions = self._learner.num_learned_from
        max_age_ms = self._configs.daemon.backfill_max_age_d * _DAY_MS
        since_ms = self._learner.ledger.watermark_ms - max_age_ms if max_age_ms else 0
        lately = sorted(user_id for user_id, seen in self._seen.items() if seen.newest_ms >= since_ms)
        batch_users = self._configs.daemon.batch_users
        with self._store.transaction() as transaction:
            transaction.user_states.begin_version(MODEL, self._version, created_at_ms=at_ms)
        for start in range(0, len(lately), batch_users):
            users = np.array(lately[start : start + batch_users], np.int64)
            below_seq = np.array([self._seen[user_id].next_seq for user_id in users.tolist()], np.int64)
            self._compute(users, below_seq, np.full(len(users), at_ms))
        with self._store.transaction() as transaction:
            transaction.user_states.serve_version(MODEL, self._version, from_ms=at_ms)

    def prune(self, now_ms: int) -> None:
        """Remove what nobody will ask for any more."""
        after_user: int | None = -1
        while after_user is not None:
            _, after_user = self._store.user_states.prune(
                MODEL,
                keep_ms=max((lag_ms for lag_ms, _ in self._readers), default=0),
                states_max=_ALL,
                now_ms=now_ms,
                after_user=after_user,
                max_users=_USERS_PER_PRUNE,
            )

    def summary(self) -> dict[str, Any]:
        """Counts and metrics of the upstream's own predictions, JSON-ready.

        `found`: by lag in ms, of how many of what was learned from there was a vector.
        """
        return {
            "versions": self._version,
            "vectors": self.num_computed,
            "metrics": self._learner.summary(),
            "found": {str(lag_ms): reader.status() for lag_ms, reader in self._readers},
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON of everything that a later step depends on, stored vectors included."""
        checkpoint = self._learner.capture_checkpoint()
        tensors = {f"learner.{name}": one for name, one in checkpoint.tensors.items()}
        if self._serving is not None:
            tensors |= {f"serving.dense.{name}": one for name, one in self._serving.dense_state().items()}
            tensors |= {f"serving.items.{name}": one for name, one in self._serving.items.state_dict().items()}
        stored = self._store.user_states.stored(MODEL, width=self._configs.model.upstream.width)
        tensors |= {f"stored.{name}": torch.from_numpy(one) for name, one in stored.columns().items()}
        waiting = [[user_id, one.due_ms, one.below_seq] for user_id, one in self._waiting.items()]
        seen = [[user_id, one.next_seq, one.newest_ms] for user_id, one in self._seen.items()]
        tensors |= {
            "waiting": torch.tensor(waiting, dtype=torch.int64).view(-1, 3),
            "seen": torch.tensor(seen, dtype=torch.int64).view(-1, 3),
        }
        versions = self._store.user_states.versions(MODEL)
        state = {
            "learner": checkpoint.state,
            "version": self._version,
            "released_ms": self._released_ms,
            "released_interactions": self._released_interactions,
            "num_computed": self.num_computed,
            "readers": [reader.status() for _, reader in self._readers],
            "versions": [[one.version, one.created_at_ms, one.serving_from_ms] for one in versions],
        }
        return tensors, state

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from `state()`, with a store that holds no vectors."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self._learner.load_checkpoint(
            Checkpoint(0, self._configs.model.config_hash(), part("learner."), state["learner"])
        )
        self._version, self._released_ms = state["version"], state["released_ms"]
        self._released_interactions, self.num_computed = state["released_interactions"], state["num_computed"]
        if self._version:
            self._serving = UpstreamModel(self._configs.model).eval()
            self._serving.load_dense_state(part("serving.dense."))
            self._serving.items.load_state_dict(part("serving.items."))
        for (_, reader), counts in zip(self._readers, state["readers"], strict=True):
            reader.num_found, reader.num_missing = counts["found"], counts["missing"]
            reader.num_damaged = counts["damaged"]
        self._waiting = {user_id: _Waiting(due, below) for user_id, due, below in tensors["waiting"].tolist()}
        self._seen = {user_id: _Seen(next_seq, newest) for user_id, next_seq, newest in tensors["seen"].tolist()}
        self._restore({name: one.numpy() for name, one in part("stored.").items()}, state["versions"])

    def _restore(self, stored: dict[str, NDArray[Any]], versions: list[list[int]]) -> None:
        with self._store.transaction() as transaction:
            states = transaction.user_states
            for version, created_at_ms, serving_from_ms in versions:
                states.begin_version(MODEL, version, created_at_ms=created_at_ms)
                states.serve_version(MODEL, version, from_ms=serving_from_ms)
                own = stored["version"] == version
                vectors = NewVectors(**{n: stored[n][own] for n in ("user_id", "next_seq", "as_of_ms", "vector")})
                states.write(MODEL, version, vectors, written_at_ms=stored["written_at_ms"][own])
