"""How an inference worker listens, batches, swaps and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

_AT_LEAST_ONE: Final = (
    "batch_max",
    "queue_max",
    "request_timeout_ms",
    "body_max_bytes",
    "k_max",
    "candidates_max",
    "exclude_max",
    "session_max",
    "categories_max",
    "diversity_pool",
    "events_max",
    "events_timeout_ms",
    "snapshot_poll_ms",
    "snapshot_cache_bytes",
    "lease_interval_ms",
    "update_poll_records",
    "store_check_ms",
    "broker_check_ms",
    "impressions_queue_max",
    "body_timeout_ms",
    "keep_alive_s",
    "drain_timeout_ms",
    "num_threads",
)
_NOT_NEGATIVE: Final = (
    "batch_wait_ms",
    "weights_behind_max_ms",
    "drain_notice_ms",
    "user_state_bytes",
    "categories_refresh_ms",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """Settings of an inference worker (`headrace serve`)."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all interfaces, :: for all with IPv6."""
    port: int = 8080
    """Port to listen on; 0 takes a free one and says which."""
    batch_max: int = 32
    """Requests answered by one forward pass at most."""
    batch_wait_ms: float = 0.0
    """How long (ms) a request that finds the model idle waits for others to share its forward pass. While the model is
    busy they gather without waiting, so this pays only where one pass costs as much for many as for one, on a GPU."""
    queue_max: int = 256
    """Requests that may wait for the model; beyond it callers get 429 with Retry-After."""
    request_timeout_ms: int = 1_000
    """Deadline of a request (ms); later it gets 504, and is not computed if it was still waiting."""
    body_max_bytes: int = 1_048_576
    """Largest request body (bytes); beyond it 413."""
    body_timeout_ms: int = 5_000
    """Time (ms) for a request's body to arrive; later 408: a caller that sends nothing must not hold a connection."""
    k_max: int = 1_000
    """Most items one recommendation may ask for."""
    candidates_max: int = 10_000
    """Most candidates one ranking may hold."""
    exclude_max: int = 10_000
    """Most items one recommendation may exclude by name."""
    session_max: int = 256
    """Most items of a `session`; the newest model.max_len of them are read."""
    categories_max: int = 64
    """Most categories that one recommendation may ask for, or exclude."""
    categories_refresh_ms: int = 30_000
    """Time (ms) between readings of all items' categories from the store, aside from answers: how late a filter by
    category knows of a change. 0: they are not read, and requests that filter by category get 503."""
    diversity_pool: int = 200
    """Best items that an answer with `diversity` is chosen from; as many as it asks for, if that is more."""
    blocking_actions: tuple[str, ...] = ()
    """Actions (of events.actions) by which users say that they do not want to see an item again: it is not recommended
    to them even without `exclude_seen`, as long as it is in the history held in memory (hot.max_len)."""
    events_max: int = 1_000
    """Most events of one `POST /v1/events`."""
    events_timeout_ms: int = 5_000
    """How long (ms) `POST /v1/events` waits for the log's acknowledgement before it answers 503."""
    channel: Literal["current", "candidate"] = "current"
    """Which version this worker serves. `candidate`: the one offered by `headrace snapshots candidate`, while there is
    one; set it on the few workers that are to try a version before the others."""
    snapshot_poll_ms: int = 500
    """Time (ms) between looks at the snapshot pointer; announcements on the `snapshots` topic are followed at once."""
    snapshot_retry_max_ms: int = 30_000
    """A refused snapshot is tried again with growing pauses up to this (ms): its storage may be at fault."""
    snapshot_cache_bytes: int = 4_294_967_296
    """Room (bytes) under `headrace.data_dir` for the files of snapshots that are stored elsewhere; the least recently
    used go first. Snapshots in a folder of this machine are read where they are."""
    lease_interval_ms: int = 10_000
    """How often (ms) a worker notes beside the snapshots which version it runs: the trainer deletes nothing that a
    worker needs which did so within `trainer.replica_timeout_s`."""
    update_poll_records: int = 64
    """History-update messages applied between two micro-batches at most: bounds how long answers wait for them."""
    store_check_ms: int = 2_000
    """Time (ms) between looks at the store: whether it answers, and which items are unavailable."""
    broker_check_ms: int = 10_000
    """Time (ms) between looks at the broker; its absence shows in /status and stops no answers."""
    weights_behind_max_ms: int = 0
    """Not ready when interactions have waited longer than this (ms) to be learned by the weights served; 0: never.
    A quiet stream leaves nothing waiting, so it never looks stale."""
    fail_open: bool = False
    """Stay ready while the store is away or the weights are behind: answers go on from memory or by popularity, and
    say so. False: leave it to other workers, which helps if they are better off, but not if all share the trouble."""
    log_impressions: bool = True
    """Write what every answer showed to the `impressions` topic."""
    impressions_queue_max: int = 10_000
    """Impressions that may wait for the log; beyond it they are dropped and counted, never delaying an answer."""
    keep_alive_s: int = 75
    """How long (s) an idle connection is kept. Longer than your load balancer keeps its own (most: 60): a connection
    that is closed here while a request is on its way fails that request."""
    drain_notice_ms: int = 200
    """Time (ms) after SIGTERM in which /readyz says 503 and requests are still answered, each connection being closed
    after its answer. Longer than the interval in which your load balancer looks: then no request is lost."""
    drain_timeout_ms: int = 5_000
    """Time (ms) for requests in flight when the worker stops."""
    user_state_bytes: int = 134_217_728
    """Memory (bytes) for what the encoder computed of users (keys and values, 1 KiB an interaction with the default
    model), so that their next request computes only what is new. Of use between two swaps; 0: nothing is kept."""
    window_hop_share: float = 0.125
    """A history longer than model.max_len is read from a start that moves on by this share of max_len at a time, since
    each move makes useless what was kept. So between (1 - share) * max_len and max_len interactions are read then."""
    num_threads: int = 1
    """CPU threads of the numerical library for one forward pass."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"serving.{name} = {getattr(self, name)}: must be at least 1")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"serving.{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.window_hop_share <= 0.5:
            raise ValueError(f"serving.window_hop_share = {self.window_hop_share}: must lie between 0 and 0.5")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"serving.port = {self.port}: must lie between 0 and 65535; 0 takes a free port")
        if self.drain_notice_ms + self.drain_timeout_ms > 8_000:
            raise ValueError(
                f"serving.drain_timeout_ms = {self.drain_timeout_ms}: with serving.drain_notice_ms "
                f"({self.drain_notice_ms}) must be at most 8000, so that a worker stops within 10 seconds"
            )
        if self.batch_wait_ms >= self.request_timeout_ms:
            raise ValueError(
                f"serving.batch_wait_ms = {self.batch_wait_ms}: must be below serving.request_timeout_ms "
                f"({self.request_timeout_ms}), or no request is answered in time"
            )
        if self.snapshot_retry_max_ms < self.snapshot_poll_ms:
            raise ValueError(
                f"serving.snapshot_retry_max_ms = {self.snapshot_retry_max_ms}: must be at least "
                f"serving.snapshot_poll_ms ({self.snapshot_poll_ms})"
            )
