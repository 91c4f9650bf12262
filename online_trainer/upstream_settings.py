"""How the upstream daemon keeps the vectors of users fresh, and how it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamDaemonConfig:
    """Settings of `headrace upstream`."""

    is_on: bool = False
    """`headrace up` starts the daemon, and trainer and workers look for vectors. `headrace upstream` by itself does not
    ask."""
    actions: tuple[str, ...] = ()
    """Actions of events.actions after which a user's vector is computed anew, such as ("purchase",): those that say
    much about the user. Without any, all are."""
    debounce_ms: int = 5_000
    """How long (ms) after the first such event of a user its vector waits for further ones: a user costs at most one
    computation in this time, and no vector is older than this and the time of a batch."""
    batch_users: int = 64
    """Users computed together at most. Batches are as large as what is due: small on a quiet stream."""
    batch_tokens: int = 16_384
    """Interactions of their histories together at most: bounds memory and time of a batch."""
    lag_ms: int = 60_000
    """When the first waiting event has waited for this long (ms), the daemon is behind: it neither learns nor fills a
    new version until it has caught up."""
    max_waiting_users: int = 200_000
    """Users that wait at most; beyond it no more events are read until some are done."""
    poll_records: int = 16
    """Update messages taken per poll."""
    learn_share: float = 0.25
    """Share of the daemon's time spent learning at most. 0: it never learns, and vectors stay those of the version in
    effect."""
    learn_interactions: int = 128
    """New interactions of one step of learning at most, of each user the newest."""
    learn_tokens: int = 16_384
    """Interactions of their histories together at most."""
    learn_pending_interactions: int = 20_000
    """Interactions read but not learned from; when more come, the oldest are passed over."""
    history_bytes: int = 268_435_456
    """Memory for the histories that learning reads (bytes)."""
    dense_learning_rate: float = 1e-3
    """Step size of the model's own parameters."""
    row_learning_rate: float = 1e-2
    """Step size of its item embeddings."""
    spike_deviations: float = 8.0
    """A step whose loss is so many standard deviations above what is typical is not learned from. 0: only losses and
    gradients that are no finite numbers are not."""
    seed: int = 42
    """Seeds the negatives that are drawn."""
    first_version_interactions: int = 20_000
    """Interactions learned from, not passed over, before the first version is released: until then there are no
    vectors."""
    version_interactions: int = 20_000
    """A new version is released after so many more ..."""
    version_interval_s: float = 3_600.0
    """... and at the earliest so long (s) after the one before was: every version computes every user's vector anew."""
    backfill_max_age_d: float = 90.0
    """Users without an interaction for so many days (event time) get no vector of a new version before their next
    high-value event. 0: all do."""
    refused_share_max: float = 0.01
    """A new version of whose vectors more than this share are no finite numbers is given up."""
    keep_versions: int = 3
    """Versions of the weights kept on disk."""
    checkpoint_interval_s: float = 60.0
    """Time between checkpoints of what is learned (s)."""
    keep_checkpoints: int = 2
    """Checkpoints kept; a corrupt newest one falls back to the one before."""
    prune_interval_s: float = 300.0
    """Pause (s) between two looks for vectors that nobody asks for any more (user_vectors.keep_ms)."""
    num_threads: int = 1
    """CPU threads of the numerical library; 0 leaves its default."""

    def __post_init__(self) -> None:
        for name in (
            "batch_users",
            "batch_tokens",
            "lag_ms",
            "max_waiting_users",
            "poll_records",
            "learn_interactions",
            "learn_tokens",
            "learn_pending_interactions",
            "first_version_interactions",
            "version_interactions",
            "keep_checkpoints",
        ):
            if not 1 <= getattr(self, name) <= 1 << 40:
                raise ValueError(f"upstream_daemon.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("debounce_ms", "version_interval_s", "backfill_max_age_d", "spike_deviations", "num_threads"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"upstream_daemon.{name} = {getattr(self, name)}: must not be negative")
        for name in ("learn_share", "refused_share_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"upstream_daemon.{name} = {getattr(self, name)}: must lie between 0 and 1")
        for name in ("checkpoint_interval_s", "prune_interval_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"upstream_daemon.{name} = {getattr(self, name)}: must be positive")
        for name in ("dense_learning_rate", "row_learning_rate"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"upstream_daemon.{name} = {getattr(self, name)}: must be between 0 and 10")
        if self.keep_versions < 2:
            raise ValueError(
                f"upstream_daemon.keep_versions = {self.keep_versions}: must be at least 2, the one in effect and the "
                "one that is filled"
            )

    def action_mask(self, declared: tuple[str, ...]) -> int:
        """Bits of the actions after which vectors are computed; ValueError for one that is not declared."""
        unknown = sorted(set(self.actions) - set(declared))
        if unknown:
            raise ValueError(
                f"upstream_daemon.actions names {', '.join(unknown)}: declared in events.actions are "
                f"{', '.join(declared)}"
            )
        return sum(1 << declared.index(name) for name in set(self.actions or declared))

    def optimizer(self) -> OptimizerConfig:
        """How weights are stepped."""
        return OptimizerConfig(dense_learning_rate=self.dense_learning_rate, row_learning_rate=self.row_learning_rate)
