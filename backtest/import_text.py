"""What an import found, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from backtest.normalising import REASONS
from backtest.recording import ImportReport, Refusals
from stream import events
from stream.events import EventRules

_MEANINGS: Final = events.REASONS | REASONS
"""Of reasons why rows, or a topic's records, are refused."""


def refusal_lines(refusals: Sequence[Refusals]) -> Iterator[str]:
    """A line a reason, and one an example."""
    for one in refusals:
        yield f"  {one.count:,} × {one.reason}: {_MEANINGS[one.reason]}"
        for example in one.examples:
            column = f", column {example.column}" if example.column else ""
            yield f"      {example.file}, row {example.row}{column}: {_printable(example.text)!r}"
        if one.count > len(one.examples):
            yield f"      and {one.count - len(one.examples):,} more"


def refused_text(refusals: Sequence[Refusals]) -> str:
    """What was refused, for an error: reasons, rows, and what to do about it."""
    lines = "\n".join(refusal_lines(refusals))
    return f"rows were refused (rows count from 0):\n{lines}\nMend the log, or give --on-error skip or dead-letter"


def report_text(report: ImportReport, rules: EventRules) -> str:
    """The whole report, for a terminal."""
    lines = [
        f"{report.num_rows:,} rows: {report.num_events:,} events, {report.num_left_out:,} left out (no interaction), "
        f"{report.num_refused:,} refused",
        f"{'about ' if report.is_estimated else ''}{report.num_users:,} users, {report.num_items:,} items",
    ]
    if report.first_ms is not None and report.last_ms is not None:
        span = timedelta(milliseconds=report.last_ms - report.first_ms)
        lines.append(f"from {_utc(report.first_ms)} to {_utc(report.last_ms)}, {span.days:,} days")
    lines.append("actions: " + ", ".join(f"{name} {count:,}" for name, count in report.actions.items()))
    undeclared = [name for name in report.actions if name not in rules.actions]
    if undeclared:
        declared = ", ".join(f'"{name}"' for name in (*rules.actions, *undeclared))
        lines.append(f"not declared: {', '.join(undeclared)}; a run needs [events] actions = [{declared}]")
    order = report.order
    if order.num_back:
        lines.append(
            f"not in order of time: {order.num_back:,} rows lie before an earlier row, first {order.first_back}; "
            f"the time goes back by {timedelta(milliseconds=order.back_ms_max)} at most. A recording is sorted"
        )
    if report.num_repeated:
        lines.append(
            f"{report.num_repeated:,} events repeat an earlier one (user, item, time and action); they are kept, since "
            "the log has no event ids"
        )
    if report.refusals:
        lines += ["refused (rows count from 0):", *refusal_lines(report.refusals)]
    return "\n".join(lines)


def _utc(epoch_ms: int) -> str:
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=epoch_ms)
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
