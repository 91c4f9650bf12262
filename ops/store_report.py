"""`headrace store`: what is in the store, for a person."""

from __future__ import annotations

from feature_store.records import AuditTotals, StoreStats
from feature_store.retention import Retention
from ops.readable import utc_time


def stats_text(stats: StoreStats) -> str:
    """A few lines: counts, how far event time has come, vectors of users, then the next offset per log and topic."""
    lines = [
        f"users         {stats.num_users:,}",
        f"interactions  {stats.num_interactions:,}",
        f"chunks        {stats.num_chunks:,}",
        f"bytes         {stats.num_bytes:,}",
    ]
    if stats.removed:
        writers = ", ".join(f"{source} {count:,}" for source, count in stats.removed.items())
        lines.append(f"removed       {sum(stats.removed.values()):,} ({writers})")
    if stats.watermark_ms:
        lines.append(f"watermark     {utc_time(stats.watermark_ms)}")
    if stats.horizon_ms is not None:
        lines.append(f"horizon       {utc_time(stats.horizon_ms)}")
    for model, versions in stats.vectors.items():
        in_effect = stats.upstream_versions.get(model)
        counts = ", ".join(
            f"{count:,} of version {version}{' (in effect)' if version == in_effect else ''}"
            for version, count in versions.items()
        )
        lines.append(f"vectors       model {model!r} {counts}")
    for log_id, topics in stats.positions.items():
        for topic, partitions in topics.items():
            places = ", ".join(f"{partition}:{offset}" for partition, offset in partitions.items())
            lines.append(f"position      log {log_id!r} {topic} {places}")
    return "\n".join(lines)


def verified_sentence(totals: AuditTotals, num_findings: int) -> str:
    """What was looked at, and the verdict."""
    seen = (
        f"{totals.num_users:,} users, {totals.num_chunks:,} chunks, {totals.num_interactions:,} interactions, "
        f"{totals.num_positions:,} positions, {totals.num_vectors:,} vectors"
    )
    return f"{seen}: nothing is wrong" if num_findings == 0 else f"{seen}: {num_findings:,} findings"


def pruned_sentence(retention: Retention, num_chunks: int, num_interactions: int) -> str:
    """What a sweep has removed."""
    if not retention.is_on:
        return "nothing expires: store.max_history and store.max_age_ms are 0"
    return f"removed {num_interactions:,} interactions in {num_chunks:,} chunks"
