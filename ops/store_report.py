"""`headrace store`: what is in the store, for a person."""

from __future__ import annotations

from feature_store.records import AuditTotals, StoreStats


def stats_text(stats: StoreStats) -> str:
    """A few lines: counts, then the next offset to apply per log and topic."""
    lines = [
        f"users         {stats.num_users:,}",
        f"interactions  {stats.num_interactions:,}",
        f"chunks        {stats.num_chunks:,}",
        f"bytes         {stats.num_bytes:,}",
    ]
    for log_id, topics in stats.positions.items():
        for topic, partitions in topics.items():
            places = ", ".join(f"{partition}:{offset}" for partition, offset in partitions.items())
            lines.append(f"position      log {log_id!r} {topic} {places}")
    return "\n".join(lines)


def verified_sentence(totals: AuditTotals, num_findings: int) -> str:
    """What was looked at, and the verdict."""
    seen = (
        f"{totals.num_users:,} users, {totals.num_chunks:,} chunks, {totals.num_interactions:,} interactions, "
        f"{totals.num_positions:,} positions"
    )
    return f"{seen}: nothing is wrong" if num_findings == 0 else f"{seen}: {num_findings:,} findings"
