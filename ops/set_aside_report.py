"""`headrace trainer inspect`: batches that were set aside, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from online_trainer.quarantine import SetAside
from ops.readable import utc_time

if TYPE_CHECKING:
    import polars as pl

_REASONS: Final = {
    "loss": "loss is no finite number",
    "gradient": "gradient is no finite number",
    "spike": "loss far above what is typical",
    "ranking_loss": "the ranking head's loss is no finite number",
    "ranking_gradient": "the ranking head's gradient is no finite number",
    "ranking_spike": "the ranking head's loss is far above what is typical",
}
_MOST: Final = 5


def list_text(kept: Sequence[SetAside]) -> str:
    """A line a batch, oldest first."""
    if not kept:
        return "no batch was set aside"
    return "\n".join(_line(why) for why in kept)


def interactions_text(why: SetAside, rows: pl.DataFrame) -> str:
    """The line of a batch, who and what is most frequent in it, and its interactions."""
    lines = [_line(why)]
    for column in ("user_id", "item_id"):
        counts = rows[column].value_counts(sort=True)
        most = ", ".join(f"{number} ({count}x)" for number, count in counts.head(_MOST).iter_rows())
        lines.append(f"{column}: {len(counts)} different, most often {most}")
    lines.append("event time                     user_id              item_id  action  value")
    for user, time_ms, item, action, value in rows.select(
        "user_id", "event_time_ms", "item_id", "action", "value"
    ).iter_rows():
        lines.append(f"{utc_time(time_ms):24s}  {user:12d}  {item:19d}  {action:6d}  {value:g}")
    return "\n".join(lines)


def _line(why: SetAside) -> str:
    loss = "" if why.loss is None else f": {why.loss:.3f}"
    typical = "" if why.typical_loss is None else f", typically {why.typical_loss:.3f}"
    when = utc_time(why.watermark_ms)
    step = f"ranking step {why.step}" if why.is_of_ranking else f"step {why.step}"
    return f"{step}  {when}  {why.num_interactions} interactions  {_REASONS[why.reason]}{loss}{typical}"
