"""Versions of the upstream model: weights that were released, whose vectors never mix with those of another version.

What is learned changes with every step; vectors are computed with weights that stand still, a *version*. It is written
as a snapshot, then known to the store, then its vectors are filled in beside those of the version in effect, and then
it takes effect, for all readers at once. Fills are one after the other.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from feature_store.store import FeatureStore
from feature_store.user_states import version_in_effect
from model.errors import SnapshotConfigError
from model.manifest import Manifest
from model.retention import ReplicaLease, SnapshotRetention, write_lease
from model.snapshot import list_versions, load_snapshot, read_manifest, write_snapshot
from model.storage import SnapshotRoot
from model.swap import apply_snapshot, take_rows
from model.upstream_model import UpstreamModel, UpstreamModelConfig
from online_trainer.upstream_learner import UpstreamLearner
from stream.clock import Clock
from stream.failpoints import fail_point

logger = logging.getLogger(__name__)

_LEASE: Final = "upstream"
_LEASE_MS: Final = 100 * 366 * 24 * 3_600_000
"""The version in effect is needed however long nobody renews it: the daemon may be down."""


def snapshots_name(model: str) -> str:
    """The name of the upstream model's snapshots beside those of the model it serves."""
    return f"{model}-upstream"


@dataclass(slots=True)
class Filling:
    """A version whose vectors are being filled in."""

    version: int
    model: UpstreamModel
    up_to: int
    """Users up to this id have been looked at."""
    num_filled: int = 0
    num_refused: int = 0
    """Vectors since this process began on it, and those of them that were no finite numbers."""


class UpstreamVersions:
    """The version in effect and the one being filled; blocking, for one thread."""

    def __init__(
        self,
        config: UpstreamModelConfig,
        *,
        root: SnapshotRoot,
        store: FeatureStore,
        model: str,
        clock: Clock,
        keep: int,
    ) -> None:
        self._config, self._root, self._store, self._model, self._clock = config, root, store, model, clock
        self._name = snapshots_name(model)
        self._retention = SnapshotRetention(root, self._name, anchors_kept=keep, replica_timeout_ms=_LEASE_MS)
        self.in_effect: int | None = None
        self.serving: UpstreamModel | None = None
        """Weights of the version in effect; None before the first."""
        self.filling: Filling | None = None
        self.released_at_ms: int | None = None
        """When the newest version was."""
        self.released_interactions = 0
        """Interactions that had been learned from when it was."""

    def load(self) -> None:
        """Take over what the store says. Raises StoreUnavailableError, or SnapshotError where weights are missing.

        Of a version of another configuration, vectors are kept up no more; they are there until one of this takes
        effect.
        """
        versions = self._store.user_states.versions(self._model)
        self.in_effect, self.filling = version_in_effect(versions), None
        self.serving = None if self.in_effect is None else self._loaded_if_ours(self.in_effect)
        if self.serving is None:
            self.in_effect = None
        waiting = [one for one in versions if one.serving_from_ms is None]
        newest = waiting[-1] if waiting else None
        if newest is not None and (model := self._loaded_if_ours(newest.version)) is not None:
            self.filling = Filling(newest.version, model, newest.filled_up_to)
        for given_up in waiting if self.filling is None else waiting[:-1]:
            self._drop(given_up.version)
        if self.serving is not None or self.filling is not None:
            self.released_at_ms = versions[-1].created_at_ms
            lineage = read_manifest(self._root, self._name, versions[-1].version).lineage
            self.released_interactions = lineage.num_interactions - lineage.num_thinned

    def models(self) -> dict[int, UpstreamModel]:
        """Version → weights, of those whose vectors are kept up."""
        found = {} if self.serving is None or self.in_effect is None else {self.in_effect: self.serving}
        return found if self.filling is None else found | {self.filling.version: self.filling.model}

    def release(self, learner: UpstreamLearner) -> None:
        """Make the weights learned so far a version, whose vectors are to be filled in.

        Raises SnapshotError, OSError or StoreUnavailableError: then there is none, and the next attempt makes another.
        """
        assert self.filling is None, "fills are one after the other"
        now_ms = self._clock.now_ms()
        known = [one.version for one in self._store.user_states.versions(self._model)]
        version = max([0, *known, *list_versions(self._root, self._name)]) + 1
        # Step 1: the weights are durable before anything is computed with them.
        manifest = Manifest(
            model=self._name,
            version=version,
            kind="anchor",
            parent=None,
            config_hash=self._config.config_hash(),
            model_config=self._config.as_dict(),
            num_items=learner.model.items.num_items,
            created_at_ms=now_ms,
            watermark_ms=learner.ledger.watermark_ms,
            lineage=learner.ledger.lineage(),
            metrics=learner.summary(),
        )
        write_snapshot(self._root, manifest, learner.model.dense_state(), take_rows(learner.model, "anchor"))
        learner.model.items.clear_dirty()
        fail_point("upstream.version_written")
        # Step 2: the store knows it, unseen by readers.
        with self._store.transaction() as transaction:
            transaction.user_states.begin_version(self._model, version, created_at_ms=now_ms)
        fail_point("upstream.version_begun")
        self.filling = Filling(version, self._loaded(version), -1)
        self.released_at_ms, self.released_interactions = now_ms, learner.num_learned_from
        self._renew_lease()
        self._retention.prune(now_ms)
        logger.info("upstream version %d is released; its vectors are filled in", version)

    def take_effect(self) -> None:
        """What was filled is what readers get from now on. Raises StoreUnavailableError."""
        filled = self.filling
        assert filled is not None, "something was filled"
        # Step 3: for all readers at once.
        with self._store.transaction() as transaction:
            from_ms = transaction.user_states.serve_version(self._model, filled.version, from_ms=self._clock.now_ms())
        fail_point("upstream.version_served")
        self.in_effect, self.serving, self.filling = filled.version, filled.model, None
        self._renew_lease()
        logger.info(
            "upstream version %d is in effect from %d on: %d vectors", filled.version, from_ms, filled.num_filled
        )

    def give_up(self) -> None:
        """What was filled never takes effect. Raises StoreUnavailableError."""
        assert self.filling is not None, "something was filled"
        self._drop(self.filling.version)
        self.filling = None

    def _drop(self, version: int) -> None:
        with self._store.transaction() as transaction:
            transaction.user_states.drop_version(self._model, version)

    def _loaded_if_ours(self, version: int) -> UpstreamModel | None:
        try:
            return self._loaded(version)
        except SnapshotConfigError as error:
            logger.warning("vectors are computed anew once a version of this configuration is learned: %s", error)
            return None

    def _loaded(self, version: int) -> UpstreamModel:
        model = UpstreamModel(self._config)
        apply_snapshot(model, load_snapshot(self._root, self._name, version))
        return model.eval()

    def _renew_lease(self) -> None:
        loading = None if self.filling is None else self.filling.version
        lease = ReplicaLease(replica=_LEASE, version=self.in_effect, loading=loading, at_ms=self._clock.now_ms())
        write_lease(self._root, self._name, lease)
