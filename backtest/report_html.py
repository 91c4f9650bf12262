"""Pieces of the report's HTML, and how it writes numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from html import escape

from backtest.bootstrap import Estimate
from backtest.evaluation import EvaluationConfig
from backtest.report_svg import Whisker
from backtest.report_words import age_text, figure, interval


def section(title: str, content: str) -> str:
    """A part of the page; content: HTML."""
    return f"<section><h2>{title}</h2>{content}</section>\n"


def table(heads: Sequence[str], rows: Iterable[str], caption: str) -> str:
    """A table of HTML cells; caption: text. Wider than the page, it scrolls by itself."""
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<p class="note">{escape(caption)}.</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cells(values: Iterable[str]) -> str:
    """Cells of HTML."""
    return "".join(f"<td>{value}</td>" for value in values)


def cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A mean and its interval."""
    if estimate is None or estimate.mean is None:
        return "<td>–</td>"
    return f"<td>{figure(estimate.mean, signed=signed)} <small>{interval(estimate)}</small></td>"


def whisker(label: str, estimate: Estimate | None) -> Whisker | None:
    """For a chart; None where there is no interval."""
    if estimate is None or estimate.mean is None or estimate.low is None or estimate.high is None:
        return None
    return Whisker(label, estimate.mean, estimate.low, estimate.high)


def utc(epoch_ms: int) -> str:
    """To the minute."""
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(epoch_ms)):%Y-%m-%d %H:%M}"


def level(config: EvaluationConfig) -> str:
    """Such as 95%."""
    return f"{config.bootstrap.level:.0%}"


def duration(length: timedelta) -> str:
    """In the unit that fits."""
    hours = length.total_seconds() / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def seconds(seconds: float) -> str:
    """In the unit that fits."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def age(age_ms: float | None) -> str:
    """In the unit that fits; – where there is none."""
    return "–" if age_ms is None else age_text("lag", int(age_ms)) if age_ms >= 1 else "0 ms"


def bytes_text(count: float) -> str:
    """In the unit that fits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"
