"""`headrace freshness` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ops.freshness_report import AgeFigures, FreshnessReport, HopFigures, ReplicaFigures
from ops.readable import duration, readable, utc_time
from stream.freshness import RECENT_MS

_QUANTILES = ("p50", "p95", "p99")


def rendered(report: FreshnessReport) -> RenderableType:
    """Both tables, what does not answer, and whether anything happens at all."""
    parts: list[RenderableType] = [_hops(report.hops)]
    if report.replicas:
        parts.append(_replicas(report.replicas))
    parts += [Text(f"{readable(who)}: {readable(why)}", style="yellow") for who, why in report.problems.items()]
    recent = duration(RECENT_MS)
    state = f"idle: nothing came in {recent}, nothing waits" if report.is_idle else f"events of the newest {recent}"
    parts.append(Text(f"{utc_time(report.at_ms)}  {state}", style="bright_black"))
    return Group(*parts)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=place != 0)
    return table


def _hops(hops: Sequence[HopFigures]) -> Table:
    ages = [f"{start} {quantile}" for start in ("append", "event") for quantile in _QUANTILES]
    table = _table(["hop", "events", "waiting", "coverage", *ages, "negative"])
    for one in hops:
        negative = one.append.num_negative + one.event.num_negative
        coverage = "–" if one.coverage is None else f"{one.coverage:.1%}"
        counts = (_count(one.num_events), _count(one.num_waiting), coverage)
        table.add_row(f"{one.hop} {one.what}", *counts, *_ages(one.append), *_ages(one.event), _count(negative))
    return table


def _replicas(replicas: Sequence[ReplicaFigures]) -> Table:
    table = _table(
        ["replica", "version", "events", *(f"F4 append {q}" for q in _QUANTILES), "weights behind", "weights age"]
    )
    for one in replicas:
        name = readable(one.replica) if one.is_running else f"{readable(one.replica)} (not running)"
        ages = (_age(one.weights_behind_ms), _age(one.weights_age_ms))
        table.add_row(name, _count(one.version), _count(one.num_events), *_ages(one.append), *ages)
    return table


def _ages(figures: AgeFigures) -> tuple[str, str, str]:
    return _age(figures.p50_ms), _age(figures.p95_ms), _age(figures.p99_ms)


def _age(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else duration(milliseconds)


def _count(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"
