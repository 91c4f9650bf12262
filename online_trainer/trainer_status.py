"""What the trainer says of itself on `/status`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from online_trainer.batching import MicroBatcher
from online_trainer.label_feed import LabelFeed
from online_trainer.lag import LagWatch
from online_trainer.learner import OnlineLearner
from online_trainer.publisher import Publisher
from stream.freshness import FreshnessRecorder


def trainer_status(
    learner: OnlineLearner,
    publisher: Publisher,
    batcher: MicroBatcher,
    lag: LagWatch,
    labels: LabelFeed | None,
    hops: Iterable[FreshnessRecorder],
    *,
    now_ms: int,
) -> dict[str, object]:
    """Counts, metrics, snapshot and freshness, JSON-ready."""
    ledger = learner.ledger
    return {
        "interactions": ledger.num_interactions,
        "supervised": ledger.num_supervised,
        "first": ledger.num_first,
        "out_of_reach": ledger.num_out_of_reach,
        "unlisted": ledger.num_unlisted,
        "weightless": ledger.num_weightless,
        "quarantined": ledger.num_quarantined,
        "forgotten": ledger.num_forgotten,
        "replayed": ledger.num_replayed,
        "items_retired": ledger.num_items_retired,
        "steps": ledger.num_steps,
        "pending": batcher.num_pending,
        "lag": lag.status(ledger),
        "repeated": batcher.num_repeated,
        "fingerprint": str(ledger.fingerprint),
        "watermark_ms": ledger.watermark_ms,
        "positions": ledger.lineage().positions,
        "metrics": learner.metrics_summary(),
        "items": learner.num_items,
        "cold_items": ledger.num_cold,
        "drift": learner.drift.summary(),
        "ranking": _ranking(learner, labels),
        "snapshot": _snapshot(publisher),
        "held": None if publisher.held is None else asdict(publisher.held),
        "freshness": {hop.hop: hop.summary(now_ms) for hop in hops},
    }


def _ranking(learner: OnlineLearner, labels: LabelFeed | None) -> dict[str, object] | None:
    if learner.ranking is None:
        return None
    return learner.ranking.status() | {"labels": None if labels is None else labels.status()}


def _snapshot(publisher: Publisher) -> dict[str, object] | None:
    newest = publisher.newest
    if newest is None:
        return None
    return {
        "version": newest.manifest.version,
        "kind": newest.manifest.kind,
        "bytes": newest.num_bytes,
        "publish_s": newest.seconds,
        "interactions": newest.manifest.lineage.num_interactions,
    }
